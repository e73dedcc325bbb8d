"""What is merged: an adapter, the base that it was trained on, and the run that made it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune.errors import MissingFileError, UserError
from finetune.files.base_identity import identify
from finetune.files.checkpoint_folder import CONFIG, companion_folder, read_json
from finetune.merge.adapter_config import find_adapter, read_adapter_config
from finetune.replies.model_style import unknown_style
from finetune.replies.task_replies import Style
from qwenvl.checkpoint.adapter_files import require_whole_adapter
from qwenvl.checkpoint.gptq import is_gptq
from qwenvl.checkpoint.identity import BaseIdentity, differences
from qwenvl.checkpoint.record import ChatFormat, ModelRecord, read_record, trained_as
from qwenvl.loading import DTYPES, ModelSource, find_source
from qwenvl.model.quantization import PARTS


@dataclass(frozen=True)
class Sources:
    """What is merged.

    Attributes:
        adapter: its folder.
        base: folder or hub id.
        run: the run folder that the adapter is the result or a checkpoint of; None for an adapter by itself.
        identity: of the base.
        checked: whether the adapter says which base it was trained on, and this is it.
        record: what the adapter was trained as.
        parts: those of the base that were in 4 bits in training (see `qwenvl.model.quantization.PARTS`).
        trained_in: the type of the base's weights in training; None where it is not known, or was the stored one.
    """

    adapter: Path
    base: str
    run: Path | None
    identity: BaseIdentity
    checked: bool
    record: ModelRecord
    parts: tuple[str, ...]
    trained_in: torch.dtype | None


def find_sources(path: Path, base: str | None, style: Style | None = None) -> Sources:
    """Find adapter, base and run, and compare the base with the one that the adapter was trained on.

    Args:
        path: run or adapter folder.
        base: folder or hub id, where the base is not where the adapter says.
        style: what the adapter was trained on; None for what its record or its base says.

    Raises:
        UserError: nothing to merge, another base, a style that nothing says, or a damaged file.
        MissingFileError: no adapter at `path`, or no base.
    """
    adapter = find_adapter(path)
    require_whole_adapter(adapter)
    folder = adapter.resolve()
    run = folder.parent if folder.name == "adapter" else None
    if folder.parent.name == "checkpoints":
        run = folder.parent.parent
    run = run if run is not None and (run / "run.json").is_file() else None
    own_record = read_record(adapter)
    named = read_adapter_config(adapter).get("base_model_name_or_path")
    if base is None:
        try:
            base = find_source(adapter).base
        except FileNotFoundError as error:
            raise MissingFileError(
                f"{adapter}: its base ({named or 'it names none'}) is not there: give it with --base"
            ) from error
    base = _without_quantization(base)
    identity = identify(base)
    noted = None if own_record is None else own_record.base
    if noted is not None and (lines := differences(noted.identity, identity)):
        raise UserError(
            f"{adapter} was trained on {noted.path}, from which {base} differs: {'; '.join(lines)}. Give the base "
            "that it was trained on, unchanged, with --base"
        )
    record = trained_as(base, adapter)
    if style is not None and style != record.style:
        chat_format: ChatFormat = "chatml" if style == "chat" else "raw"
        record = replace(record, chat_format=chat_format, stop_ids=(), read_from=f"--style {style}")
    if record.chat_format is None:
        raise UserError(unknown_style(adapter, ModelSource(base, str(adapter))))
    model = _model_section(run)
    trained_in = DTYPES.get(str(model.get("dtype")))
    return Sources(adapter, base, run, identity, noted is not None, record, record.quantize, trained_in)


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
    record = read_record(folder)
    noted = None if record is None or record.base is None else record.base.path
    if noted is None or not (Path(noted) / CONFIG).is_file():
        raise UserError(
            f"{base} is quantised: its weights are rounded already, and merging would round them again. Give the "
            f"16-bit checkpoint that it was made from{f' ({noted})' if noted else ''} with --base"
        )
    return noted


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
