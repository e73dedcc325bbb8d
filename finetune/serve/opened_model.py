"""A model that is opened to be served: what computes replies, and under which names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from peft import PeftConfig

from finetune.errors import UserError
from finetune.replies.decoder import Decoder
from finetune.replies.model_style import ModelUse, find_use
from finetune.replies.replies import without_adapter
from finetune.replies.task_replies import Style
from finetune.replies.torch_decoder import TorchDecoder
from finetune.serve.adapters import MERGE, ModelAdapters, changes_base
from finetune.serve.asked_name import Asking, as_asked, name_of, use_of_adapter
from finetune.serve.served_names import ServedNames
from qwenvl import QwenVLConfig, QwenVLImageProcessor, QwenVLTokenizer, load_model, load_processor
from qwenvl.base_check import check_base
from qwenvl.loading import read_adapter
from qwenvl.loading_errors import adapter_errors

PREFIX_BYTES = 512_000_000
"""Keys and values of earlier prompts that are kept: a thousand tokens of the published model in 16 bits."""


@dataclass(frozen=True)
class OpenedModel:
    """What an engine runs.

    Attributes:
        decoder: computes the next tokens.
        encode: (images, 3, S, S) uint8, and the adapter of their prompt or None -> (images, n_queries, hidden).
        vision_key: of an adapter or None: which weights encode images under it. Features of the same picture under
            equal keys are equal.
        tokenizer: of the model.
        image_processor: of the model; None for one that reads text only.
        config: of the model.
    """

    decoder: Decoder
    encode: Callable[[torch.Tensor, str | None], torch.Tensor]
    vision_key: Callable[[str | None], str]
    tokenizer: QwenVLTokenizer
    image_processor: QwenVLImageProcessor | None
    config: QwenVLConfig


def open_served(
    model: str,
    *,
    name: str | None = None,
    adapters: Mapping[str, str] | None = None,
    base_name: str | None = None,
    base: str | None = None,
    style: Style | None = None,
    system: str | None = None,
    prompt: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    prefix_bytes: int = PREFIX_BYTES,
) -> tuple[OpenedModel, ServedNames]:
    """Open a model to be served, with adapters by name.

    Where `model` is an adapter or a run with one, it is one adapter on its base as the others are, and the base by
    itself is served only under a `base_name`.

    Args:
        model: anything `qwenvl.load_model` takes.
        name: of it; None is that of its folder or run, or its hub id.
        adapters: folders, runs or hub ids of further adapters on the same base, by name.
        base_name: of the base of an adapter, where it is to be served as well.
        base: of an adapter, where it is not where the adapter says.
        style: "chat" or "base"; None for each name's own.
        system: the system message of requests without one; None for each name's own, as trained, else the default one.
        prompt: a template with {question} or {phrase} that each message of a user is put into, "trained" for the one
            that a name was trained with, or "plain" for none. None is "trained" where there is one.
        dtype: as in `load_model`.
        quantization: "nf4" or "none"; None for the model's own, as it was trained.
        prefix_bytes: of keys and values of earlier prompts, kept for those that begin as they do.

    Raises:
        InputError: an argument is wrong, found before weights are loaded; or an adapter does not fit.
    """
    asking = Asking(style, system, prompt, quantization)
    use = find_use(model, base=base, style=style, quantization=quantization)
    checkpoint = use.source.base
    tokenizer = QwenVLTokenizer.from_pretrained(checkpoint)
    own_name, others = name or name_of(model), dict(adapters or {})
    alone = _why_alone(use)
    if alone and (others or base_name is not None):
        raise UserError(f"{model} cannot be served beside others: {alone}. {MERGE}")
    if base_name is not None and use.source.adapter is None:
        raise UserError(f"--base-name {base_name}: {model} is no adapter; --name gives it a name")

    # All that can be wrong with a name is said before the weights are read.
    uses = {own_name: use}
    if base_name is not None:
        of_base = find_use(checkpoint, style=style)
        _add(uses, base_name, replace(of_base, quantized=use.quantized, loaded_by=use.loaded_by))
    for other, folder in others.items():
        _add(uses, other, use_of_adapter(folder, checkpoint, use.quantized, asking))
    for each, of_name in uses.items():
        as_asked(of_name, each, None, tokenizer, asking)
        if (adapter := of_name.source.adapter) is not None:
            if each in others:
                _refuse_beside_others(adapter)
            check_base(adapter, checkpoint, page_cache=True, cached=True)

    loaded = load_model(
        checkpoint,
        adapter=use.source.adapter if alone else None,
        dtype=dtype,
        quantization=use.quantization,
        quantize=use.quantize,
        device_map="auto" if torch.cuda.is_available() else None,
    )
    held = ModelAdapters(without_adapter(loaded), checkpoint)
    decoder = TorchDecoder(loaded if alone else held.model, prefix_bytes=prefix_bytes)
    names = ServedNames(
        checkpoint,
        use.quantized,
        tokenizer,
        asking,
        None if alone else _DecodedAdapters(held, decoder),
        no_adapters=f"{model} cannot be served beside others: {alone}. {MERGE}",
    )
    for each, of_name in uses.items():
        if of_name.source.adapter is None or alone:
            names.put(of_name, each, None)
        else:
            alone_on_base = each == own_name and base_name is None
            note = f"its base {checkpoint} is not served by itself; --base-name gives it a name"
            names.load(each, of_name.name, notes=[note] if alone_on_base else ())

    def encode(images: torch.Tensor, adapter: str | None) -> torch.Tensor:
        with torch.no_grad():
            images = images.to(held.model.device)
            if alone:
                return held.model.get_image_features(images)
            with held.active(adapter if adapter is not None and held.touches_vision(adapter) else None):
                return held.model.get_image_features(images)

    def vision_key(adapter: str | None) -> str:
        return f"{adapter} " if adapter is not None and held.touches_vision(adapter) else ""

    image_processor = None if held.model.config.visual is None else load_processor(checkpoint).image_processor
    return OpenedModel(decoder, encode, vision_key, tokenizer, image_processor, held.model.config), names


class _DecodedAdapters:
    """The adapters of a model, of which its decoder keeps what it has computed."""

    def __init__(self, held: ModelAdapters, decoder: TorchDecoder) -> None:
        self._held, self._decoder = held, decoder
        self.add = held.add

    def remove(self, name: str) -> None:
        self._decoder.forget(name)
        self._held.remove(name)


def _add(uses: dict[str, ModelUse], name: str, use: ModelUse) -> None:
    if name in uses:
        raise UserError(
            f"two models are to be served as {name}: {uses[name].name} and {use.name}. Give one another name"
        )
    uses[name] = use


def _refuse_beside_others(adapter: str) -> None:
    """Raises:
    UserError: an adapter that changes its base.
    """
    if changed := changes_base(read_adapter(adapter)):
        raise UserError(f"{adapter} cannot be served beside others: {changed}. {MERGE}")


def _why_alone(use: ModelUse) -> str:
    """Why a model cannot be served with others on its base; empty where it can.

    Raises:
        InputError: an adapter that is damaged, or of a kind that replies do not compute.
    """
    adapter = use.source.adapter
    if adapter is None:
        return ""
    reading = read_adapter(adapter)
    if reading.config is None:
        with adapter_errors(adapter):
            config = PeftConfig.from_pretrained(adapter)
        if config.is_prompt_learning:
            raise UserError(f"{use.name}: adapters that learn a prompt ({config.peft_type}) cannot be served")
    return changes_base(reading)
