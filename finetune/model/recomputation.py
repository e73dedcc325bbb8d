"""Activation recomputation (gradient checkpointing) of the model's layers: `train.checkpointing`.

| | kept of each layer | computed again in the backward pass |
|---|---|---|
| none | all activations that backward needs | nothing |
| selective | its input and the attention's output | all but attention |
| full | its input | all |
| offload | nothing on the device: its input is moved to host memory and back | all |

The layers are set up here and not by the trainer: with an adapter around the model, TRL's `selective` reaches the
layers in some versions of Transformers only, and its offloading of activations needs a GPU.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from qwenvl.model.vision import VisionTransformer

Recomputation = Literal["none", "selective", "full", "offload"]

LEAST_FIRST: tuple[Recomputation, ...] = ("none", "selective", "full", "offload")
"""By how much is recomputed or moved."""

ATTENTION_KERNELS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torch_attn::_varlen_attn",
)


def set_recomputation(
    model: nn.Module, kind: Recomputation, to_host: Callable[[], AbstractContextManager[Any]] | None = None
) -> None:
    """Choose which activations the layers of a model in training keep; gradients are the same for every kind.

    The layers of a frozen vision transformer keep no activations in any case and are left alone.

    Args:
        model: with or without adapter.
        to_host: for "offload", a context inside which saved tensors are moved to host memory; None is PyTorch's
            `save_on_cpu`.
    """
    frozen = {
        id(layer)
        for tower in model.modules()
        if isinstance(tower, VisionTransformer) and not _trains_layers(tower)
        for layer in tower.modules()
    }
    recompute = None if kind == "none" else _recompute(kind, to_host or _to_pinned_memory)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = recompute is not None and id(layer) not in frozen
            if layer.gradient_checkpointing:
                layer._gradient_checkpointing_func = recompute  # type: ignore[assignment]  # torch: Tensor | Module


def _recompute(kind: Recomputation, to_host: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Any]:
    """What calls a layer's forward so that its activations are recomputed."""
    # Not the reentrant variant, which gives a layer no gradients if its input needs none.
    recompute = partial(checkpoint, use_reentrant=False)
    if kind == "selective":
        return partial(recompute, context_fn=partial(create_selective_checkpoint_contexts, _keep_attention))
    if kind == "offload":
        return partial(_offloaded, recompute, to_host)
    return recompute


def _trains_layers(tower: VisionTransformer) -> bool:
    after_layers = ("attn_pool.", "ln_post.", "proj")
    return any(
        parameter.requires_grad for name, parameter in tower.named_parameters() if not name.startswith(after_layers)
    )


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    schema = getattr(operation, "_schema", None)
    kept = schema is not None and (schema.name in ATTENTION_KERNELS or "flash_attn" in schema.name)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _offloaded(
    recompute: Callable[..., Any],
    to_host: Callable[[], AbstractContextManager[Any]],
    forward: Callable[..., Any],
    *args: Any,
) -> Any:
    with to_host():
        return recompute(forward, *args)


def _to_pinned_memory() -> AbstractContextManager[Any]:
    return save_on_cpu(pin_memory=torch.cuda.is_available())
