"""Rotary position embeddings, and two extensions beyond the training context: dynamic NTK and log-n attention.

Both extensions are for eval mode: a training forward always uses the plain table.
"""

import math
from typing import NamedTuple

import torch


class Positions(NamedTuple):
    """What every attention layer needs to know about positions, computed once per forward.

    cos, sin: (batch, 1, length, head_dim), float32.
    log_n: (batch, 1, length, 1), float32 factor of the queries, or None if all are 1.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    log_n: torch.Tensor | None


def rotary_positions(
    position_ids: torch.Tensor,
    *,
    head_dim: int,
    base: float,
    ntk_alpha: torch.Tensor | None = None,
    log_n_from: int | None = None,
) -> Positions:
    """The rotary table at the given positions.

    Args:
        position_ids: (batch, length), 0-based, each within its own sequence.
        base: rotary base without extension.
        ntk_alpha: (batch, length) or (batch, 1), see `dynamic_ntk_alpha`; None for 1 everywhere.
        log_n_from: `seq_length` if log-n attention is on: queries at 1-based positions beyond it are scaled by
            log(position, seq_length). None if it is off.
    """
    device = position_ids.device
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    positions = position_ids.to(torch.float32)
    if ntk_alpha is None:
        frequencies = 1.0 / base**exponents
    else:
        stretched = base * ntk_alpha ** (head_dim / (head_dim - 2))
        frequencies = 1.0 / stretched[..., None] ** exponents
    angles = positions[..., None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    log_n = None
    if log_n_from is not None:
        log_n = (torch.log(positions + 1) / math.log(log_n_from)).clamp(min=1)[:, None, :, None]
    return Positions(angles.cos(), angles.sin(), log_n)


def rotate(x: torch.Tensor, positions: Positions) -> torch.Tensor:
    """Rotate `x` (batch, heads, length, head_dim): pairs are value i of the first and of the second half. Computed in
    float32, returned in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * positions.cos + turned * positions.sin).to(x.dtype)


def scale_by_log_n(query: torch.Tensor, positions: Positions) -> torch.Tensor:
    """Scale queries (batch, heads, length, head_dim) by their log-n factor, if there is one; in the query's dtype."""
    if positions.log_n is None:
        return query
    return (query * positions.log_n).to(query.dtype)


def dynamic_ntk_alpha(lengths: torch.Tensor, seq_length: int) -> torch.Tensor:
    """`max(2 ** ceil(log2(length / seq_length) + 1) - 1, 1)`: 1 up to seq_length, 3 up to twice, 7 up to four times.

    `frexp` makes the ceiling exact when length / seq_length is a power of two.
    """
    mantissa, exponent = torch.frexp(lengths.to(torch.float32) / seq_length)
    doublings = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=0)
    return torch.exp2(doublings + 1).round() - 1


def own_sequence_length(position_ids: torch.Tensor) -> torch.Tensor:
    """Length of the packed sequence that each position belongs to: (batch, length) -> (batch, length).

    A new sequence begins wherever the position does not follow the one before it.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    segment = begins.cumsum(dim=-1) - 1
    counts = torch.zeros_like(position_ids).scatter_add_(1, segment, torch.ones_like(position_ids))
    return counts.gather(1, segment)
