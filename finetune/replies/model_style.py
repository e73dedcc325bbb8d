"""How a model is asked and loaded: as it was trained, unless a command says otherwise."""

from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError
from finetune.replies.task_replies import Style
from qwenvl import QwenVLConfig
from qwenvl.checkpoint.record import ModelRecord, trained_as
from qwenvl.loading import ModelSource, find_parts, refuse_other_record, require_loadable
from qwenvl.model.quantization import quantized_parts


@dataclass(frozen=True)
class ModelUse:
    """How a command asks and loads a model.

    Attributes:
        name: of the model, as it was given.
        source: its checkpoint, and the adapter on it.
        record: what it was trained as.
        style: how it is asked.
        asked_by: what says the style.
        quantized: parts that are in 4 bits once it is loaded.
        loaded_by: what says them; empty where the checkpoint is loaded as it is stored.
    """

    name: str
    source: ModelSource
    record: ModelRecord
    style: Style
    asked_by: str
    quantized: tuple[str, ...]
    loaded_by: str

    @property
    def quantization(self) -> str | None:
        """For `load_model`, with `quantize=quantize`."""
        return "nf4" if self.quantized else None if self.source.adapter is None else "none"

    @property
    def quantize(self) -> tuple[str, ...] | None:
        return self.quantized or None

    def __str__(self) -> str:
        asked = f"asked as {'a chat' if self.style == 'chat' else 'a base'} model ({self.asked_by})"
        if self.loaded_by:
            in_bits = f"in 4 bits: {', '.join(self.quantized)}" if self.quantized else "in 16 or 32 bits"
            asked += f"; base {in_bits} ({self.loaded_by})"
        return asked


def find_use(
    model: str, *, base: str | None = None, style: Style | None = None, quantization: str | None = None
) -> ModelUse:
    """Find how to ask and load a model: what is given, else what its record or its published files say.

    Args:
        model: whatever `qwenvl.load_model` takes.
        base: of an adapter, where it is not where the adapter says.
        style: as given; None for the model's own.
        quantization: "nf4" or "none" as given; None for the model's own.

    Raises:
        InputError: there is no such model or base, a damaged file, a style that nothing says, or a quantisation that
            the checkpoint contradicts.
    """
    source = require_loadable(model) if base is None else require_loadable(base, adapter=model)
    record = trained_as(source.base, source.adapter)
    refuse_other_record(source, record)
    own_style = record.style
    if style is None and own_style is None:
        raise UserError(unknown_style(model, source))
    trained = record.quantize if source.adapter is not None else ()
    quantized = find_parts(source.base, quantization, trained=trained)
    if quantization is not None:
        loaded_by = f"--quantization {quantization}"
    elif trained and not quantized_parts(QwenVLConfig.from_pretrained(source.base)):
        loaded_by = "as it was trained; --quantization none for 16 bits"
    else:
        loaded_by = ""
    asked = (style, f"--style {style}") if style is not None else (own_style, record.read_from)
    assert asked[0] is not None, "refused above"
    return ModelUse(model, source, record, asked[0], asked[1], quantized, loaded_by)


def unknown_style(model: str | Path, source: ModelSource) -> str:
    """Why it is not known how a model is asked, and what to do."""
    if source.adapter is not None:
        return (
            f"{model}: nothing says whether this adapter was trained on chats (ChatML) or on raw text: it has no "
            f"qwenvl.json, and {source.base} is not a chat model. Give --style chat or --style base"
        )
    return (
        f"{model}: its generation config does not say whether it is a chat model (chat_format: chatml) or a base "
        "model (raw). Give --style chat or --style base"
    )
