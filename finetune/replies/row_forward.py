"""A model's forward over rows that each name an adapter, or none."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from finetune.errors import UserError
from finetune.replies.active_adapter import AdapterLayer, adapter_layers, has_adapter
from finetune.replies.masks import takes_masks
from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration

NO_ADAPTER = "__base__"
"""PEFT's name in `adapter_names` of rows without an adapter."""


class RowForward:
    """The forward of a model with or without adapters.

    A row that names no adapter is computed by the model as it stands. Where rows name adapters, none is active
    otherwise: they are switched on for one forward.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(base, QwenVLForConditionalGeneration), f"a {type(base).__name__} is not a Qwen-VL model"
        self.base = base
        self._mixed: dict[str, bool] = {}

    @property
    def config(self) -> QwenVLConfig:
        return self.base.config

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def lane(self, adapter: str | None) -> str | None:
        """Rows with equal lanes can be in one forward: None for all that PEFT computes beside each other.

        Raises:
            UserError: the model has no such adapter.
        """
        if adapter is None:
            return None
        if adapter not in self._mixed:
            layers = [layer for layer in adapter_layers(self.base) if has_adapter(layer, adapter)]
            if not layers:
                raise UserError(f"the model has no adapter {adapter!r}")
            self._mixed[adapter] = all(_mixes(layer, adapter) for layer in layers)
        return None if self._mixed[adapter] else adapter

    def __call__(self, adapters: Sequence[str | None], **inputs: Any) -> torch.Tensor:
        """(rows, vocabulary) logits after each row.

        Args:
            adapters: of the rows, which are of one lane.
            inputs: of the model, of which `logits_to_keep` leaves one position a row.
        """
        with takes_masks(self.config), self._adapters(adapters):
            logits: torch.Tensor = self.base(**inputs).logits[:, 0]
        return logits

    @contextmanager
    def _adapters(self, adapters: Sequence[str | None]) -> Iterator[None]:
        named = {name for name in adapters if name is not None}
        if not named:
            yield
            return
        layers = [layer for layer in adapter_layers(self.base) if any(has_adapter(layer, name) for name in named)]
        if len(set(adapters)) == 1:
            (name,) = named
            try:
                for layer in layers:
                    layer.set_adapter([name], inference_mode=True)
                yield
            finally:
                for layer in layers:
                    layer.set_adapter([], inference_mode=True)
            return
        names = [NO_ADAPTER if name is None else name for name in adapters]

        def with_names(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "adapter_names": names}

        modules = [layer for layer in layers if isinstance(layer, nn.Module)]
        hooks = [module.register_forward_pre_hook(with_names, with_kwargs=True) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _mixes(layer: AdapterLayer, name: str) -> bool:
    """Whether PEFT computes this layer's rows with an adapter beside rows with others: of plain LoRA."""
    return (
        isinstance(layer, LoraLayer)
        and not isinstance(layer, ParamWrapper)
        and not layer.use_dora.get(name, False)
        and name not in layer.lora_variant
    )
