"""The kernels of a CUDA device or CPU, imitated on the meta device: what they keep for backward and their workspaces.

Without this, the meta device would compute attention by single operations that keep all attention weights, keep the
mask of a dropout in the values' dtype where CUDA keeps one byte a value, and run none of liger's fused kernels. What a
kernel allocates inside itself (the 16-bit weight that bitsandbytes makes for a 4-bit product) is seen on no device and
is told by `own_bytes`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwenvl.model import varlen_attention
from qwenvl.model.language import MLP, Attention, RMSNorm
from qwenvl.model.rotary import Positions, scale_by_log_n

aten = torch.ops.aten

# Attention implementations that take packs of sequences without a mask.
WITHOUT_MASK = ("varlen", "flash_attention_2")
MASK_ALIGNMENT = 8  # values: CUDA's kernel needs rows of a mask to begin at multiples of it

# --- attention and dropout -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def kernels_of(device_type: str) -> Iterator[None]:
    """Inside, attention and dropout on the meta device run the kernels that a cuda or cpu device would run."""
    plain = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = _sdpa_of(device_type, plain)
    dropout = nn.functional.dropout
    if device_type == "cuda":
        nn.functional.dropout = functools.partial(_fused_dropout, dropout)
    spelled_out = varlen_attention.spelled_out_is_faster
    varlen_attention.spelled_out_is_faster = functools.partial(spelled_out, device_type=device_type)
    overridden = WITHOUT_MASK if device_type == "cuda" else ()
    for name in overridden:
        ALL_ATTENTION_FUNCTIONS[name] = _attention_without_mask
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = plain
        nn.functional.dropout = dropout
        varlen_attention.spelled_out_is_faster = spelled_out
        for name in overridden:
            del ALL_ATTENTION_FUNCTIONS[name]


def _fused_dropout(
    plain: Callable[..., torch.Tensor],
    values: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> torch.Tensor:
    if not (values.is_meta and training and 0 < p < 1) or inplace:
        return plain(values, p, training, inplace)
    return aten.native_dropout(values, p, training)[0]


def _sdpa_of(device_type: str, plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def sdpa(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not query.is_meta:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **kwargs)
        mask = None if attn_mask is None else _additive(attn_mask, query.dtype)
        if device_type == "cpu":
            kernel = aten._scaled_dot_product_flash_attention_for_cpu
            return kernel(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]
        if mask is None and query.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if mask is not None:
            mask = _aligned(mask).expand(*query.shape[:-1], key.shape[-2])
        keeps = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
        kernel = aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, mask, keeps, dropout_p, is_causal, scale=scale)[0]

    return sdpa


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as the additive one that PyTorch allocates from it in each layer."""
    return torch.zeros(mask.shape, dtype=dtype, device="meta") if mask.dtype == torch.bool else mask


def _aligned(mask: torch.Tensor) -> torch.Tensor:
    short = -mask.shape[-1] % MASK_ALIGNMENT
    return nn.functional.pad(mask, (0, short))[..., : mask.shape[-1]] if short else mask


def _attention_without_mask(
    module: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """(batch, heads, length, head_dim) -> (batch, length, heads, head_dim), as the kernels of `WITHOUT_MASK`."""
    causal = module.is_causal and query.shape[2] > 1
    output = aten._scaled_dot_product_flash_attention(query, key, value, dropout, causal, scale=scaling)[0]
    return output.transpose(1, 2), None


# --- workspaces ------------------------------------------------------------------------------------------------------


def own_bytes(device_type: str) -> Callable[[Any, tuple[Any, ...]], int]:
    """For `live_bytes.LiveBytes`: the workspace of an operation, allocated inside its kernel while it runs."""

    def own(operation: Any, arguments: tuple[Any, ...]) -> int:
        name = operation._schema.name
        if name == "bitsandbytes::gemm_4bit":
            return _of_gemm_4bit(*arguments)
        if device_type == "cuda" and name in _ATTENTION_BACKWARDS:
            # The queries' gradient accumulates in float32, beside one float32 for each query.
            query = arguments[1]
            return 4 * (query.numel() + prod(query.shape[:-1]))
        return 0

    return own


_ATTENTION_BACKWARDS = (
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_efficient_attention_backward",
    "torch_attn::_varlen_attn_backward",
)


def _of_gemm_4bit(
    values: torch.Tensor, codes: torch.Tensor, shape: Sequence[int], absmax: torch.Tensor, blocksize: int, *others: Any
) -> int:
    """The dequantised weight and its blocks' magnitudes in float32, where no kernel multiplies by the codes."""
    size = prod(shape)
    return size * values.dtype.itemsize + 4 * (size // blocksize)


# --- liger's fused kernels -------------------------------------------------------------------------------------------


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, scales)
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        # Left out: the weight's partial sums, one for each of the GPU's multiprocessors, 2 MB in all.
        return torch.zeros_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _RopeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _tokens_first(query), _tokens_first(key)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: torch.Tensor, grad_key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _tokens_first(grad_query), _tokens_first(grad_key)


def _tokens_first(heads: torch.Tensor) -> torch.Tensor:
    """(batch, heads, length, head_dim), as a copy unless the length is outermost in memory already."""
    return heads.transpose(1, 2).contiguous().transpose(1, 2)


class _SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, value)
        return torch.empty_like(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ctx.saved_tensors  # gradients overwrite them in place


class FusedRMSNorm(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _RMSNormFunction.apply(x, self.weight) if x.dtype == self.weight.dtype else super().forward(x)


class FusedAttention(Attention):
    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, positions: Positions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, key = _RopeFunction.apply(query, key)
        return scale_by_log_n(query, positions), key


class FusedMLP(MLP):
    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return _SwiGLUFunction.apply(self.w2(x), self.w1(x))


FUSED: dict[type[nn.Module], type[nn.Module]] = {RMSNorm: FusedRMSNorm, Attention: FusedAttention, MLP: FusedMLP}


@contextlib.contextmanager
def fused_shapes(model: nn.Module, kernels: str) -> Iterator[None]:
    """Inside, a model on the meta device runs as with these kernels (see `qwenvl.model.kernels`)."""
    plain = {module: type(module) for module in model.modules() if kernels == "liger" and type(module) in FUSED}
    for module, kind in plain.items():
        module.__class__ = FUSED[kind]
    try:
        yield
    finally:
        for module, kind in plain.items():
            module.__class__ = kind
