"""How a checkpoint or an adapter is asked when it is served, and whether it can be served beside others."""

from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError
from finetune.replies.model_style import ModelUse, find_use
from finetune.replies.prompt_template import asking_notes, choose_template
from finetune.replies.stop_ids import stop_ids_as_trained
from finetune.replies.task_replies import Style
from finetune.serve.served_name import ServedName
from qwenvl import QwenVLConfig, QwenVLTokenizer
from qwenvl.errors import MissingFileError
from qwenvl.loading import find_adapter

LONGEST_NAME = 128


@dataclass(frozen=True)
class Asking:
    """How all names are asked, where a command says it.

    Attributes:
        style, system, prompt: as given with `--style`, `--system` and `--prompt`; None for each name's own.
        quantization: as given with `--quantization`; None for each name's own.
    """

    style: Style | None = None
    system: str | None = None
    prompt: str | None = None
    quantization: str | None = None


def as_asked(use: ModelUse, name: str, adapter: str | None, tokenizer: QwenVLTokenizer, asking: Asking) -> ServedName:
    """What is served under a name.

    Args:
        use: of a checkpoint or an adapter on it.
        name: as clients call it.
        adapter: what the decoder calls its adapter; None for the model without one.
        tokenizer: of the model.
        asking: what the command says.

    Raises:
        UserError: the name is none, or it cannot be asked as the command says.
    """
    if not name.isprintable() or not name or name != name.strip() or len(name) > LONGEST_NAME:
        raise UserError(f"{name[:200]!r} is no name for a model: give up to {LONGEST_NAME} printable characters")
    record, base = use.record, use.source.base
    if use.style == "base" and asking.system is not None:
        raise UserError(f"{use.name} is a base model, which continues raw text: it has no system message")
    config = QwenVLConfig.from_pretrained(base)
    template = choose_template(asking.prompt, record, use.name)
    notes = asking_notes(record, use.style, prompt=asking.prompt, template=template, system=asking.system)
    return ServedName(
        name=name,
        adapter=adapter,
        record=record,
        style=use.style,
        template=template,
        system=asking.system if asking.system is not None else record.system,
        stop_ids=stop_ids_as_trained(base, config, record, tokenizer, use.style),
        tokenizer=tokenizer,
        n_queries=config.n_queries,
        takes_images=config.visual is not None,
        folder=use.name,
        notes=(str(use), *notes),
    )


def use_of_adapter(folder: str, base: str, quantized: tuple[str, ...], asking: Asking) -> ModelUse:
    """How an adapter is used on a base that is loaded, or will be.

    Args:
        folder: adapter or run folder, or hub id.
        base: folder or hub id.
        quantized: parts of the base in 4 bits.
        asking: what the command says.

    Raises:
        InputError: it is none, is damaged, or was trained on a base in another form.
    """
    if find_adapter(folder) is None:
        if folder.startswith(("/", ".", "~")) and not Path(folder).exists():
            raise MissingFileError(f"{folder}: no such folder")
        raise UserError(f"{folder} is no adapter: only adapters on {base} can be served beside it")
    use = find_use(folder, base=base, style=asking.style, quantization=asking.quantization)
    if use.quantized != quantized:
        raise UserError(
            f"{folder} was trained on {_in_bits(use.quantized)}, and the model that is served, {base}, has "
            f"{_in_bits(quantized)}: serve them apart, or give --quantization to say how all are loaded"
        )
    return use


def name_of(model: str) -> str:
    """The name that a model has by itself: that of its folder, of the run that it is the result of, or its hub id."""
    path = Path(model)
    if not path.exists():
        return model.rstrip("/")
    path = path.resolve()
    is_result = path.name in ("adapter", "model") and (path.parent / "run.json").is_file()
    return (path.parent if is_result else path).name


def _in_bits(parts: tuple[str, ...]) -> str:
    return f"{' and '.join(parts)} in 4 bits" if parts else "all of it in 16 or 32 bits"
