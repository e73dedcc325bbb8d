"""liger-kernel's kernels as shapes: on the meta device they make and keep what the real ones do, and compute nothing.

What each of them makes, keeps for its backward and writes in place is read off liger-kernel 0.8.5 (`ops/rms_norm.py`,
`rope.py`, `swiglu.py`).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from qwenvl.language import MLP, Attention, RMSNorm
from qwenvl.rotary import Positions, scale_by_log_n


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, scales)
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        x, weight, _ = ctx.saved_tensors
        # The weight's comes from partial sums, one for each of the GPU's multiprocessors: 2 MB, which are left out.
        return torch.zeros_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _RopeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _tokens_first(query), _tokens_first(key)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query: torch.Tensor, grad_key: torch.Tensor):
        return _tokens_first(grad_query), _tokens_first(grad_key)


def _tokens_first(heads: torch.Tensor) -> torch.Tensor:
    """(batch, heads, length, head_dim): copied where tokens are not what comes first in memory, or else in place."""
    return heads.transpose(1, 2).contiguous().transpose(1, 2)


class _SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, value)
        return torch.empty_like(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        return ctx.saved_tensors  # their gradients are written over them


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


FUSED = {RMSNorm: FusedRMSNorm, Attention: FusedAttention, MLP: FusedMLP}


@contextlib.contextmanager
def fused_shapes(model: nn.Module, kernels: str) -> Iterator[None]:
    """Inside, a model of shapes runs as it would with these kernels (see `qwenvl.kernels`)."""
    plain = {module: type(module) for module in model.modules() if kernels == "liger" and type(module) in FUSED}
    for module, kind in plain.items():
        module.__class__ = FUSED[kind]
    try:
        yield
    finally:
        for module, kind in plain.items():
            module.__class__ = kind
