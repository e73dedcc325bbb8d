"""Softmax attention behind Transformers' attention interface, for all three attentions of the model."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwenvl.model.configuration import QwenVLConfig


class AttentionLayer(nn.Module):
    """A module that attends, with the attributes that Transformers' attention functions read from it."""

    is_causal: bool
    num_key_value_groups = 1  # no grouped-query attention: each head has its own keys and values

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        self.config = config


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain operations, which also returns its weights: the reference for the fused kernels.

    Shapes: query (b, heads, q, d), key and value (b, heads, k, d), mask additive and broadcastable to
    (b, heads, q, k); returns ((b, q, heads, d), (b, heads, q, k)).
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def attend(
    module: AttentionLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by the implementation that the config names (eager, sdpa, flash_attention_2, ...).

    Shapes as in `eager_attention`; returns ((b, q, heads * d), weights or None if the kernel does not return them).
    """
    function = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention)
    output, weights = function(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout if module.training else 0.0,
        scaling=query.shape[-1] ** -0.5,
        **kwargs,
    )
    return output.flatten(2), weights
