"""Logits and loss of an output head in 4 bits, which is never dequantised as a whole: that would take 1.2 GB.

bitsandbytes dequantises the whole matrix for a product with more than a few rows. Here it is dequantised a few
thousand tokens of the vocabulary at a time.
"""

from collections.abc import Iterator
from math import ceil
from typing import TYPE_CHECKING, Protocol, TypeGuard

import torch
from torch import nn

from qwenvl.model.nf4_weights import is_quantized, quant_state

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

TOKENS_AT_A_TIME = 8192
"""Tokens of the vocabulary: 67 MB of the published head in 16 bits. A power of two, so that pieces begin at blocks."""

FEW_ROWS = 4
"""The most rows for which bitsandbytes' kernels multiply by the codes directly."""


def comes_in_pieces(head: nn.Module, hidden: torch.Tensor) -> "TypeGuard[Linear4bit]":
    """Whether a head can be used in pieces: it is in 4 bits, has no bias, and is on the device of the hidden states (a
    hook of a device_map would move it there only when the module is called)."""
    return is_quantized(head) and head.weight.device == hidden.device and head.bias is None


def head_logits(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of any head; of one in 4 bits, piece by piece.

    Args:
        hidden: (..., hidden).

    Returns:
        (..., vocabulary)
    """
    if not comes_in_pieces(head, hidden) or hidden.shape[:-1].numel() <= FEW_ROWS:
        return head(hidden)
    from bitsandbytes import matmul_4bit

    x = hidden.to(head.compute_dtype or hidden.dtype)
    return torch.cat([matmul_4bit(x, codes, quant_state=state) for _, codes, state in _pieces(head)], -1).to(
        hidden.dtype
    )


class _Context(Protocol):
    """What `QuantizedHeadCrossEntropy` uses of its autograd context."""

    needs_input_grad: tuple[bool, ...]
    gradient: torch.Tensor | None


class QuantizedHeadCrossEntropy(torch.autograd.Function):
    """Sum of -log p(target) over rows of hidden states through a 4-bit head; the gradient is computed in forward.

    One pass over the vocabulary gives each row's log-sum-exp, a second one the gradient. Dequantising twice costs
    milliseconds; the head itself is frozen and gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: _Context, hidden: torch.Tensor, head: "Linear4bit", targets: torch.Tensor, chunk: int, for_training: bool
    ) -> torch.Tensor:
        wide_type = torch.promote_types(hidden.dtype, torch.float32)
        log_sums = torch.full(targets.shape, -torch.inf, dtype=wide_type, device=hidden.device)
        gold = torch.zeros_like(log_sums)
        for tokens, weight in _dequantized_pieces(head, hidden.dtype):
            for rows in _rows(hidden, chunk):
                logits = (hidden[rows] @ weight.T).to(wide_type)
                log_sums[rows] = torch.logaddexp(log_sums[rows], logits.logsumexp(-1))
                places, is_here = _places(targets[rows], tokens)
                gold[rows] += torch.where(is_here, logits.gather(1, places)[:, 0], 0)
        gradient = None
        if for_training and ctx.needs_input_grad[0]:
            gradient = torch.zeros_like(hidden, dtype=wide_type)
            for tokens, weight in _dequantized_pieces(head, hidden.dtype):
                for rows in _rows(hidden, chunk):
                    wide = (hidden[rows] @ weight.T).to(wide_type).sub_(log_sums[rows, None]).exp_()
                    places, is_here = _places(targets[rows], tokens)
                    wide.scatter_add_(1, places, -is_here.to(wide_type)[:, None])
                    gradient[rows] += wide.to(weight.dtype) @ weight
            gradient = gradient.to(hidden.dtype)
        # Not a saved tensor: activation offloading would move it to the host and back.
        ctx.gradient = gradient
        return (log_sums - gold).sum()

    @staticmethod
    def backward(ctx: _Context, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradient is None:
            raise RuntimeError("Trying to backward through the loss a second time: its gradients are already freed")
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad_total), None, None, None, None


def _rows(hidden: torch.Tensor, chunk: int) -> Iterator[slice]:
    for start in range(0, len(hidden), chunk):
        yield slice(start, start + chunk)


def _places(targets: torch.Tensor, tokens: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of the targets in a piece of the vocabulary, (rows, 1), and whether each is in this piece, (rows,)."""
    is_here = (targets >= tokens.start) & (targets < tokens.stop)
    return (targets - tokens.start).clamp(0, len(tokens) - 1)[:, None], is_here


def _dequantized_pieces(head: "Linear4bit", dtype: torch.dtype) -> Iterator[tuple[range, torch.Tensor]]:
    from bitsandbytes.functional import dequantize_4bit

    for tokens, codes, state in _pieces(head):
        yield tokens, dequantize_4bit(codes, state).to(dtype)


def _pieces(head: "Linear4bit") -> "Iterator[tuple[range, torch.Tensor, QuantState]]":
    """Split the head along the vocabulary: the tokens of each piece, its codes and its state. Views, no copies."""
    from bitsandbytes.functional import QuantState

    state, codes = quant_state(head), head.weight.data.view(-1)
    vocabulary, width = state.shape
    for start in range(0, vocabulary, TOKENS_AT_A_TIME):
        tokens = range(start, min(start + TOKENS_AT_A_TIME, vocabulary))
        first, last = start * width, tokens.stop * width
        nested = state.state2
        if nested is not None:
            block = state.blocksize * nested.blocksize
            assert first % block == 0, (first, block)
            nested = QuantState(
                absmax=nested.absmax[first // block : ceil(last / block)],
                code=nested.code,
                blocksize=nested.blocksize,
                dtype=nested.dtype,
            )
        piece = QuantState(
            absmax=state.absmax[first // state.blocksize : ceil(last / state.blocksize)],
            shape=torch.Size((len(tokens), width)),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
            offset=state.offset,
            state2=nested,
        )
        yield tokens, codes[first // 2 : ceil(last / 2)].view(-1, 1), piece
