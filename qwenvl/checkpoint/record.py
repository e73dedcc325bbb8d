"""`qwenvl.json`: what a model was trained as, beside its weights and in its adapter's folder.

Weights alone do not say how a model is asked: a base checkpoint trained on ChatML still has the base's
`generation_config.json`, and an adapter trained on a 4-bit base computes something else on the 16-bit one. Whatever
writes a model writes this record, and whatever opens one reads it here.

    {"version": 1,
     "base": {"path": "Qwen/Qwen-VL", "weights": "9f2c...", "computation": {"seq_length": 2048, ...}, ...},
     "quantize": ["language"],
     "chat_format": "chatml", "stop_ids": [151645, 151644, 151643],
     "views": {"page": true, "grid": [2, 2], "overlap": 0.1},
     "labels": "assistant", "prompts": {"vqa": ["{question}\\nAnswer in one word."]}}
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qwenvl.checkpoint.checkpoint_files import find_file, read_json
from qwenvl.checkpoint.identity import BaseIdentity, identity_from_json, identity_to_json
from qwenvl.errors import InputError
from qwenvl.views import Views

RECORD = "qwenvl.json"
VERSION = 1

BASE_FILE = "base.json"
"""What was written in place of the record before there was one: the base, its fingerprint and the 4-bit parts."""

OF_A_RUN = "it is the result of a run, which trains ChatML"

ChatFormat = Literal["chatml", "raw"]
"""How a model is asked: in ChatML, or in raw text that it continues; the words of the published generation configs."""

CHAT_FORMATS: tuple[ChatFormat, ...] = ("chatml", "raw")
LABELS = ("assistant", "structure")
PARTS = ("language", "vision", "head")


@dataclass(frozen=True)
class BaseNote:
    """Which checkpoint a model was made from.

    Attributes:
        path: folder or hub id, as it was given.
        identity: what decides what it computes.
    """

    path: str
    identity: BaseIdentity


@dataclass(frozen=True)
class ModelRecord:
    """What a model was trained as.

    Attributes:
        base: of an adapter, the checkpoint that it was trained on; of a checkpoint, the one that it was made from.
            None where that is not known.
        own_weights: of a 4-bit folder, the fingerprint of its own tensors: while it holds, an adapter on `base`
            belongs to the folder too.
        own_sampled: the same of some values of each tensor, which was all before there were records. Not stored.
        quantize: of an adapter, the parts of its base in 4 bits while it was trained; of a checkpoint, those in 4 bits
            now (see `qwenvl.model.quantization.PARTS`).
        chat_format: None where nothing says it.
        stop_ids: the tokens at which a reply ends; empty where they follow from `chat_format` alone.
        prompts: templates of the user's text in training, by format of the data, such as
            `{"vqa": ("{question} Answer:",)}`; empty for a format whose rows bring what the user says.
        system: the system message of training; None for the default one, or where it differed from row to row.
        views: what pictures an image was in training; None for itself alone.
        grounding: whether `<ref>`, `<box>` and `<quad>` in texts were tokens in training.
        labels: what was learned: the "assistant" replies, or the "structure" of turns too; None if not known.
        read_from: the file that says `chat_format`, or in words why it is assumed. Not stored.
    """

    base: BaseNote | None = None
    own_weights: str | None = None
    own_sampled: str | None = None
    quantize: tuple[str, ...] = ()
    chat_format: ChatFormat | None = None
    stop_ids: tuple[int, ...] = ()
    prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    system: str | None = None
    views: Views | None = None
    grounding: bool = False
    labels: str | None = None
    read_from: str = ""

    @property
    def style(self) -> Literal["chat", "base"] | None:
        """`chat_format` in the words of the command line."""
        return None if self.chat_format is None else "chat" if self.chat_format == "chatml" else "base"

    @property
    def only_prompt(self) -> str | None:
        """The template that every row was asked by; None where there were several, or rows without one."""
        templates = [template for of_format in self.prompts.values() for template in of_format or ("",)]
        return templates[0] if len(templates) == 1 and templates[0] else None

    @property
    def templates(self) -> list[str]:
        """All templates of training, each once."""
        return list(dict.fromkeys(template for of_format in self.prompts.values() for template in of_format))

    @property
    def markup_is_text(self) -> bool:
        """Whether `<ref>`, `<box>` and `<quad>` in texts were text in training; False where no training is recorded.

        Rows of format `grounding` have them as tokens, whatever `grounding` says of texts.
        """
        return self.labels is not None and not self.grounding and "grounding" not in self.prompts


def trained_as(base: str | Path, adapter: str | Path | None = None) -> ModelRecord:
    """Find what a checkpoint, or an adapter on it, was trained as.

    In this order: the record; what was written before there were records, in the folder or its run's; `chat_format` of
    the published generation config; and what follows from where the folder is. Of an adapter of another program only
    its base is known: on a chat model it is taken for a chat adapter, on a base model nothing says what it learned.

    Args:
        base: checkpoint folder or hub id.
        adapter: folder of an adapter on it, if there is one.

    Raises:
        InputError: a record that is damaged or of a later version, or a damaged generation config.
    """
    if adapter is not None and (record := _record_of_adapter(Path(adapter))) is not None:
        return record
    found = read_record(base) or ModelRecord()
    if found.chat_format is None:
        chat_format, read_from = _published_chat_format(base)
        if _run_file(Path(base), "model") is not None:
            # The generation config is the base's; this toolkit trains ChatML.
            chat_format, read_from = "chatml", OF_A_RUN
        found = replace(found, chat_format=chat_format, read_from=read_from)
    if adapter is None:
        return found
    known = found.chat_format == "chatml"
    return ModelRecord(
        chat_format="chatml" if known else None,
        stop_ids=found.stop_ids if known else (),
        read_from="its base is a chat model" if known else "",
    )


def read_record(path: str | Path) -> ModelRecord | None:
    """Read the record of a folder or hub id; None where it has none.

    A folder from before there were records has `base.json`: an adapter of this toolkit, which trains ChatML, or a
    4-bit checkpoint, whose generation config says what it is.

    Raises:
        InputError: the record is damaged or of a later version.
    """
    file = find_file(path, RECORD)
    if file is None:
        return _read_base_file(path)
    read = read_json(file)
    if read.get("version") != VERSION or read["version"] is True:
        raise InputError(
            f"{file}: version {read.get('version')!r} is not known, only {VERSION}: a later version of this software "
            "wrote it. Update this one"
        )
    return _from_json(read, file)


def write_record(folder: str | Path, record: ModelRecord) -> None:
    """Write the record into a folder. Only what says something is written."""
    content: dict[str, Any] = {"version": VERSION}
    if record.base is not None:
        content["base"] = {"path": record.base.path, **identity_to_json(record.base.identity)}
    if record.own_weights is not None:
        content["own_weights"] = record.own_weights
    if record.quantize:
        content["quantize"] = list(record.quantize)
    if record.chat_format is not None:
        content["chat_format"] = record.chat_format
    if record.stop_ids:
        content["stop_ids"] = list(record.stop_ids)
    if record.labels is not None:
        content["labels"] = record.labels
    if record.grounding:
        content["grounding"] = True
    if record.views is not None:
        content["views"] = record.views.to_json()
    if record.system is not None:
        content["system"] = record.system
    if record.prompts:
        content["prompts"] = {name: list(templates) for name, templates in record.prompts.items()}
    (Path(folder) / RECORD).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _run_file(result: Path, name: str) -> Path | None:
    """`run.json` of the run that a folder of this name is the result of; None where it is not in a run's folder."""
    file = result.resolve().parent / "run.json"
    return file if result.resolve().name == name and file.is_file() else None


def _record_of_adapter(adapter: Path) -> ModelRecord | None:
    """An adapter's record; of one in a run's folder from before there were records, also what `run.json` says."""
    record = read_record(adapter)
    run_file = _run_file(adapter, "adapter")
    if run_file is None or (record is not None and (record.read_from == RECORD or record.quantize)):
        return record
    record = record or ModelRecord(chat_format="chatml", read_from=OF_A_RUN)
    return replace(record, quantize=_parts_of_run(run_file))


def _parts_of_run(run_file: Path) -> tuple[str, ...]:
    """The parts of the base that were in 4 bits in a run.

    Raises:
        InputError: its `run.json` is damaged.
    """
    model: Any = read_json(run_file)
    for key in ("identity", "recipe", "model"):
        model = model.get(key) if isinstance(model, dict) else None
    if not isinstance(model, dict) or model.get("quantization", "none") == "none":
        return ()
    parts = model.get("quantize") or ["language"]
    if not isinstance(parts, list) or not all(part in PARTS for part in parts):
        raise InputError(f"{run_file}: quantize is {parts!r}, but the parts are {', '.join(PARTS)}: restore the file")
    return tuple(parts)


def _published_chat_format(base: str | Path) -> tuple[ChatFormat | None, str]:
    file = find_file(base, "generation_config.json")
    said = None if file is None else read_json(file).get("chat_format")
    known = next((chat_format for chat_format in CHAT_FORMATS if chat_format == said), None)
    return known, "" if known is None else "generation_config.json"


def _from_json(read: Mapping[str, Any], file: Path) -> ModelRecord:
    """Every key is checked: one that is not understood could change what the model computes."""
    record = ModelRecord(read_from=RECORD)
    for key, value in read.items():
        match key, value:
            case "version", _:
                pass
            case "base", {"path": str(path), **identity}:
                record = replace(record, base=BaseNote(path, identity_from_json(identity, file)))
            case "own_weights", str():
                record = replace(record, own_weights=value)
            case "quantize", list() if all(part in PARTS for part in value):
                record = replace(record, quantize=tuple(value))
            case "chat_format", str() if value in CHAT_FORMATS:
                record = replace(record, chat_format=value)
            case "stop_ids", list() if all(type(token) is int and token >= 0 for token in value):
                record = replace(record, stop_ids=tuple(value))
            case "labels", str() if value in LABELS:
                record = replace(record, labels=value)
            case "grounding", bool():
                record = replace(record, grounding=value)
            case "system", str():
                record = replace(record, system=value)
            case "views", dict():
                record = replace(record, views=_read_views(value, file))
            case "prompts", dict() if all(_are_templates(templates) for templates in value.values()):
                record = replace(record, prompts={name: tuple(templates) for name, templates in value.items()})
            case _:
                raise InputError(
                    f"{file}: {key}: {json.dumps(value, ensure_ascii=False)[:80]} is not understood: restore the file "
                    "as it was written, or update this software"
                )
    return record


def _read_views(value: Mapping[str, Any], file: Path) -> Views:
    try:
        return Views.from_json(value)
    except InputError as error:
        raise InputError(f"{file}: {error}. Restore the file as it was written, or update this software") from None


def _are_templates(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(template, str) for template in value)


def _read_base_file(folder: str | Path) -> ModelRecord | None:
    file = find_file(folder, BASE_FILE)
    if file is None:
        return None
    match read_json(file):
        case {"base": str(path), "fingerprint": str(fingerprint), **others}:
            parts, own = others.get("quantize", []), others.get("own_fingerprint")
            if isinstance(parts, list) and all(part in PARTS for part in parts) and isinstance(own, str | None):
                identity = identity_from_json(fingerprint, file)
                record = ModelRecord(BaseNote(path, identity), own_sampled=own, quantize=tuple(parts))
                is_adapter = find_file(folder, "adapter_config.json") is not None
                trains = "this toolkit trained it, and trains ChatML"
                return replace(record, chat_format="chatml", read_from=trains) if is_adapter else record
    raise InputError(f"{file} does not name a base, its fingerprint and its 4-bit parts: restore it, or delete it")
