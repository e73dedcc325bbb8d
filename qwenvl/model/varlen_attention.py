"""Attention within the sequences of a pack, each by itself: no mask of the whole pack is made, nor attended through.

Registered with Transformers as the attention implementation `varlen`. A mask for a pack of n tokens has n x n values,
and what lies outside its blocks is computed for nothing: with eight sequences, seven eighths of it.
"""

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwenvl.model.sequences import PackedSequences

VARLEN = "varlen"

CAUSAL = (-1, 0)
"""As a window: everything before a token, nothing behind it. `varlen_attn` knows it by this very tuple."""

LONGEST_SPELLED_OUT = 1024
"""Tokens of a sequence whose attention is spelled out at most."""

LARGEST_HEAD = 256
"""Channels of a head that the kernel takes at most; they must be a multiple of 8 too."""


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
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each of `sequences`; where there are none (padding, a cache, images), plain SDPA.

    Args:
        query, key, value: (batch, heads, length, head_dim).
        attention_mask: for plain SDPA; with `sequences` there is none.
        sequences: of the batch's rows laid end to end.

    Returns:
        (batch, length, heads, head_dim), and None in the place of the weights.
    """
    if sequences is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    # (tokens, heads, head_dim), which is how the projections wrote them.
    flat = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]
    attend = _attend_in_one_kernel if kernel_takes(query, dropout) else _attend_one_by_one
    output = attend(*flat, sequences, scaling=scaling, dropout=dropout)
    return output.unflatten(0, (query.shape[0], query.shape[2])), None


def kernel_takes(query: torch.Tensor, dropout: float = 0.0) -> bool:
    """Whether PyTorch's variable-length kernel computes this attention: 16 bits, on an Ampere GPU or a later one."""
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
    dropout: float,
) -> torch.Tensor:
    bounds, longest = sequences.bounds, sequences.longest
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=CAUSAL)


def _attend_one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: PackedSequences,
    *,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Each sequence by itself: also in float32, and on the CPU, where there is no kernel for all at once."""
    pieces = (part.transpose(0, 1)[None].split(sequences.lengths, dim=2) for part in (query, key, value))
    attended = [
        _attend_in_halves(*one, scaling=scaling)
        if spelled_out_is_faster(one[0], dropout)
        else nn.functional.scaled_dot_product_attention(*one, is_causal=True, dropout_p=dropout, scale=scaling)
        for one in zip(*pieces, strict=True)
    ]
    return torch.cat(attended, dim=2)[0].transpose(0, 1)


def spelled_out_is_faster(query: torch.Tensor, dropout: float = 0.0, device_type: str | None = None) -> bool:
    """Whether to train without SDPA, whose backward is slow in bfloat16 on the CPU; long weights take much memory."""
    return (
        (device_type or query.device.type) == "cpu"
        and query.dtype == torch.bfloat16
        and query.requires_grad
        and dropout == 0
        and query.shape[2] <= LONGEST_SPELLED_OUT
    )


def _attend_in_halves(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float) -> torch.Tensor:
    """Causal attention spelled out, (1, heads, length, head_dim); the first half's tokens never see the second's."""
    length = query.shape[2]
    attended = []
    for begin, end in ((0, length // 2), (length // 2, length)):
        scores = query[:, :, begin:end] @ key[:, :, :end].transpose(-1, -2) * scaling
        hidden = scores.new_full((end - begin, end), float("-inf")).triu(begin + 1)
        weights = nn.functional.softmax(scores + hidden, dim=-1)
        attended.append(weights @ value[:, :, :end])
    return torch.cat(attended, dim=2)


ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention)
# For what is not a pack.
ALL_MASK_ATTENTION_FUNCTIONS.register(VARLEN, sdpa_mask)
