"""What is merged: an adapter, the base that it was trained on, and the run that made it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.errors import MissingFileError, UserError
from finetune.files.checkpoint_folder import CONFIG, companion_folder, read_json
from finetune.merge.adapter_config import find_adapter, read_adapter_config
from qwenvl.checkpoint.fingerprint import BASE_FILE, weights_fingerprint
from qwenvl.checkpoint.gptq import is_gptq
from qwenvl.loading import DTYPES, find_source
from qwenvl.model.quantization import DEFAULT_PARTS, PARTS


@dataclass(frozen=True)
class Sources:
    """What is merged.

    Attributes:
        adapter: its folder.
        base: folder or hub id.
        run: the run folder that the adapter is the result of; None for an adapter by itself.
        fingerprint: of the base's weights.
        checked: whether the adapter says which base it was trained on, and this is it.
        parts: those of the base that were in 4 bits in training (see `qwenvl.model.quantization.PARTS`).
        trained_in: the type of the base's weights in training; None where it is not known, or was the stored one.
    """

    adapter: Path
    base: str
    run: Path | None
    fingerprint: str
    checked: bool
    parts: tuple[str, ...]
    trained_in: torch.dtype | None


def find_sources(path: Path, base: str | None) -> Sources:
    """Find adapter, base and run, and compare the base with the one that the adapter was trained on.

    Raises:
        UserError: nothing to merge, another base, or a damaged file.
        MissingFileError: no adapter at `path`, or no base.
    """
    adapter = find_adapter(path)
    run = adapter.resolve().parent if adapter.resolve().name == "adapter" else None
    run = run if run is not None and (run / "run.json").is_file() else None
    noted = _read_base_file(adapter) if (adapter / BASE_FILE).is_file() else {}
    named = read_adapter_config(adapter).get("base_model_name_or_path")
    if base is None:
        try:
            base = find_source(adapter).base
        except FileNotFoundError as error:
            raise MissingFileError(
                f"{adapter}: its base ({named or 'it names none'}) is not there: give it with --base"
            ) from error
    base = _without_quantization(base)
    fingerprint = weights_fingerprint(base)
    if noted and noted["fingerprint"] != fingerprint:
        raise UserError(
            f"{adapter} was trained on {noted['base']} (fingerprint {noted['fingerprint']}), but {base} has other "
            f"weights (fingerprint {fingerprint}): give the right base with --base"
        )
    model = _model_section(run)
    trained_in = DTYPES.get(str(model.get("dtype")))
    return Sources(adapter, base, run, fingerprint, bool(noted), _parts_in_4bit(noted, model), trained_in)


def _read_base_file(folder: Path) -> dict[str, Any]:
    """What an adapter or a 4-bit folder notes of its base (see `qwenvl.checkpoint.fingerprint.write_base`).

    Raises:
        UserError: it is damaged.
    """
    file = folder / BASE_FILE
    noted = read_json(file)
    for key in ("base", "fingerprint"):
        if not isinstance(noted.get(key), str):
            raise UserError(f"{file}: {key} is missing: restore the file")
    _refuse_parts(noted.get("quantize"), file)
    return noted


def _refuse_parts(parts: Any, file: Path) -> None:
    if parts is not None and not (isinstance(parts, list) and all(part in PARTS for part in parts)):
        raise UserError(f"{file}: quantize is {parts!r}, but the parts are {', '.join(PARTS)}: restore the file")


def _without_quantization(base: str) -> str:
    """The base, or where it is a 4-bit folder, the 16-bit checkpoint that it was made from.

    Raises:
        UserError: the base is quantised, and the checkpoint that it was made from is not known or not there.
    """
    folder = companion_folder(base)
    quantization = read_json(folder / CONFIG).get("quantization_config")
    if not quantization or is_gptq(quantization):  # GPTQ's weights are read as 16-bit ones
        return base
    noted = _read_base_file(folder)["base"] if (folder / BASE_FILE).is_file() else None
    if noted is None or not (Path(noted) / CONFIG).is_file():
        raise UserError(
            f"{base} is quantised: its weights are rounded already, and merging would round them again. Give the "
            f"16-bit checkpoint that it was made from{f' ({noted})' if noted else ''} with --base"
        )
    return noted


def _parts_in_4bit(noted: dict[str, Any], model: dict[str, Any]) -> tuple[str, ...]:
    if noted.get("quantize"):
        return tuple(noted["quantize"])
    if model.get("quantization", "none") == "none":
        return ()
    return tuple(model.get("quantize") or DEFAULT_PARTS)


def _model_section(run: Path | None) -> dict[str, Any]:
    """The `model` section of a run's resolved recipe; empty where there is none.

    Raises:
        UserError: its `run.json` is damaged.
    """
    section: Any = {} if run is None else read_json(run / "run.json")
    for key in ("identity", "recipe", "model"):
        section = section.get(key) if isinstance(section, dict) else None
    if run is None or not isinstance(section, dict):
        return {}
    _refuse_parts(section.get("quantize"), run / "run.json")
    return section
