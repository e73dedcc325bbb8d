"""What is merged: an adapter, the base it was trained on, and the run that it came from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.errors import UserError
from finetune.files.checkpoint_folder import companion_folder, read_json
from finetune.merge.adapter_config import ADAPTER_CONFIG, find_adapter
from finetune.run.folder import RunFolder
from qwenvl.checkpoint.fingerprint import BASE_FILE, weights_fingerprint
from qwenvl.loading import DTYPES, find_source


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
        trained_in: the type that training held the base in; None where that is not known, or was as it is stored.
    """

    adapter: Path
    base: str
    run: Path | None
    fingerprint: str
    checked: bool
    parts: tuple[str, ...]
    trained_in: torch.dtype | None


def find_sources(path: Path, base: str | None) -> Sources:
    """Find adapter, base and run, and hold the base against the one that the adapter was trained on.

    Raises:
        UserError: nothing to merge, or another base.
        FileNotFoundError: no adapter at `path`, or no base.
    """
    adapter = find_adapter(path)
    run = adapter.resolve().parent if adapter.resolve().name == "adapter" else None
    run = run if run is not None and (run / "run.json").is_file() else None
    noted = read_json(adapter / BASE_FILE) if (adapter / BASE_FILE).is_file() else {}
    if base is None:
        try:
            base = find_source(adapter).base
        except FileNotFoundError as error:
            named = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
            raise FileNotFoundError(
                f"{adapter}: its base ({named or 'it names none'}) is not there: give it with --base"
            ) from error
    base = _without_quantization(base)
    fingerprint = weights_fingerprint(base)
    if noted and noted["fingerprint"] != fingerprint:
        raise UserError(
            f"{adapter} was trained on {noted['base']} (fingerprint {noted['fingerprint']}), but {base} has other "
            f"weights (fingerprint {fingerprint}): give the right base with --base"
        )
    recipe = _recipe(run)
    trained_in = DTYPES.get(recipe.get("model", {}).get("dtype"))
    return Sources(adapter, base, run, fingerprint, bool(noted), _parts_in_4bit(noted, recipe), trained_in)


def _without_quantization(base: str) -> str:
    """The 16-bit base, which a 4-bit folder says it was made from.

    Raises:
        UserError: the base is quantised and does not say.
    """
    folder = companion_folder(base)
    if not read_json(folder / "config.json").get("quantization_config"):
        return base
    noted = read_json(folder / BASE_FILE).get("base") if (folder / BASE_FILE).is_file() else None
    if noted is None or not (Path(noted) / "config.json").is_file():
        raise UserError(
            f"{base} is quantised: its weights are rounded already, and merging would round them again. Give the "
            f"16-bit checkpoint that it was made from{f' ({noted})' if noted else ''} with --base"
        )
    return noted


def _parts_in_4bit(noted: dict[str, Any], recipe: dict[str, Any]) -> tuple[str, ...]:
    if noted.get("quantize"):
        return tuple(noted["quantize"])
    model = recipe.get("model", {})
    return () if model.get("quantization", "none") == "none" else tuple(model.get("quantize") or ("language",))


def _recipe(run: Path | None) -> dict[str, Any]:
    """The resolved recipe of a run; empty where there is none."""
    described = RunFolder(run).read_run() if run is not None else None
    return (described or {}).get("identity", {}).get("recipe", {})
