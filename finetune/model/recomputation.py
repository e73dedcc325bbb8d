"""How much of a forward is computed anew on the way back instead of kept: `train.checkpointing`.

| | kept of each layer | done anew |
|---|---|---|
| none | everything that the way back reads | nothing |
| selective | its input, what attention gives | all but attention |
| full | its input | all |
| offload | nothing: its input goes to host memory and comes back | all |

It is put on the layers here, not by the trainer: with an adapter around the model, what TRL does for `selective`
reaches the layers in some versions of Transformers only, and its offloading of activations needs a GPU.
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

Checkpointing = Literal["none", "selective", "full", "offload"]

LEAST_FIRST: tuple[Checkpointing, ...] = ("none", "selective", "full", "offload")
"""By what is computed or moved again."""

ATTENTION_KERNELS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torch_attn::_varlen_attn",
)


def checkpoint_blocks(
    model: nn.Module, kind: Checkpointing, to_host: Callable[[], AbstractContextManager] | None = None
) -> None:
    """Make the layers of a model in training forget what they can compute anew.

    Gradients are the same. The layers of a frozen vision transformer keep nothing in any case, and are left alone.

    Args:
        model: with or without adapter.
        to_host: a context that moves what is kept inside it to host memory and back; None is PyTorch's.
    """
    frozen = {
        id(layer)
        for tower in model.modules()
        if isinstance(tower, VisionTransformer) and not _trains_layers(tower)
        for layer in tower.modules()
    }
    compute_anew = None
    if kind != "none":
        # Without reentrance: gradients reach the trained weights of a layer whose input needs none.
        compute_anew = partial(checkpoint, use_reentrant=False)
    if kind == "selective":
        compute_anew = partial(compute_anew, context_fn=partial(create_selective_checkpoint_contexts, _keep_attention))
    if kind == "offload":
        compute_anew = partial(_offloaded, compute_anew, to_host or _to_pinned_memory)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = compute_anew is not None and id(layer) not in frozen
            if layer.gradient_checkpointing:
                layer._gradient_checkpointing_func = compute_anew


def _trains_layers(tower: VisionTransformer) -> bool:
    behind = ("attn_pool.", "ln_post.", "proj")
    return any(parameter.requires_grad for name, parameter in tower.named_parameters() if not name.startswith(behind))


def _keep_attention(context, operation, *args, **kwargs) -> CheckpointPolicy:
    name = getattr(operation, "_schema", None)
    kept = name is not None and (name.name in ATTENTION_KERNELS or "flash_attn" in name.name)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _offloaded(compute_anew: Callable, to_host: Callable[[], AbstractContextManager], forward: Callable, *args) -> Any:
    with to_host():
        return compute_anew(forward, *args)


def _to_pinned_memory() -> AbstractContextManager:
    return save_on_cpu(pin_memory=torch.cuda.is_available())
