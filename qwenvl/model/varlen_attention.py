"""Variable-length attention for packed sequences: each attends within itself, without a mask of the whole pack.

Registered with Transformers as the attention implementation `varlen`. A mask for a pack of n tokens has n x n values,
and attention with it computes scores that are masked out: with eight equal sequences, seven eighths of them.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwenvl.model.sequences import PackedSequences

VARLEN = "varlen"

CAUSAL = (-1, 0)
"""Window size of causal attention: all tokens before, none after. `varlen_attn` compares with this exact tuple."""

LONGEST_SPELLED_OUT = 1024
"""Longest sequence, in tokens, whose attention is computed in plain operations."""

LARGEST_HEAD = 256
"""Largest head dimension that the kernel supports; it must be a multiple of 8, too."""


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sequences: PackedSequences | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each of `sequences`; without them (padding, a cache, images), plain SDPA.

    Args:
        query, key, value: (batch, heads, length, head_dim).
        attention_mask: for plain SDPA; unused with `sequences`.
        sequences: of the batch's rows, concatenated.

    Returns:
        (batch, length, heads, head_dim), and None for the weights.
    """
    if sequences is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    # (tokens, heads, head_dim), the layout in which the projections wrote them.
    flat_query, flat_key, flat_value = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    if kernel_takes(query, dropout):
        output = _attend_in_one_kernel(flat_query, flat_key, flat_value, sequences, scaling=scaling)
    else:
        output = _attend_one_by_one(flat_query, flat_key, flat_value, sequences, scaling=scaling, dropout=dropout)
    return output.unflatten(0, (query.shape[0], query.shape[2])), None


def kernel_takes(query: torch.Tensor, dropout: float = 0.0) -> bool:
    """Whether PyTorch's variable-length kernel supports this attention: 16 bits, on an Ampere GPU or later."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= LARGEST_HEAD
        and dropout == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _attend_in_one_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: PackedSequences,
    *,
    scaling: float,
) -> torch.Tensor:
    bounds, longest = sequences.bounds, sequences.longest
    output = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=CAUSAL)
    assert isinstance(output, torch.Tensor), "a tuple only with return_aux"
    return output


def _attend_one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: PackedSequences,
    *,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """One sequence after the other: for float32 and for the CPU, which have no kernel for all at once."""
    pieces = (part.transpose(0, 1)[None].split(sequences.lengths, dim=2) for part in (query, key, value))
    attended = [
        _attend_in_halves(q, k, v, scaling=scaling)
        if spelled_out_is_faster(q, dropout)
        else nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scaling)
        for q, k, v in zip(*pieces, strict=True)
    ]
    return torch.cat(attended, dim=2)[0].transpose(0, 1)


def spelled_out_is_faster(query: torch.Tensor, dropout: float = 0.0, device_type: str | None = None) -> bool:
    """Whether plain operations train faster than SDPA, whose backward is slow in bfloat16 on the CPU. Not for long
    sequences, whose attention weights take much memory."""
    return (
        (device_type or query.device.type) == "cpu"
        and query.dtype == torch.bfloat16
        and query.requires_grad
        and dropout == 0
        and query.shape[2] <= LONGEST_SPELLED_OUT
    )


def _attend_in_halves(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float) -> torch.Tensor:
    """Causal attention in plain operations, (1, heads, length, head_dim). It is computed in two halves because tokens
    of the first half do not see the second: a quarter of the scores is not computed."""
    length = query.shape[2]
    attended = []
    for begin, end in ((0, length // 2), (length // 2, length)):
        scores = query[:, :, begin:end] @ key[:, :, :end].transpose(-1, -2) * scaling
        hidden = scores.new_full((end - begin, end), float("-inf")).triu(begin + 1)
        weights = nn.functional.softmax(scores + hidden, dim=-1)
        attended.append(weights @ value[:, :, :end])
    return torch.cat(attended, dim=2)


ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention)
# The mask for batches without packing.
ALL_MASK_ATTENTION_FUNCTIONS.register(VARLEN, sdpa_mask)
