"""Fused GPU kernels of liger-kernel for rotary positions, RMSNorm and SwiGLU.

The plain modules in `language` are the reference; these agree with them up to rounding.
"""

from importlib.util import find_spec

import torch
from torch import nn

from qwenvl.errors import InputError
from qwenvl.model.language import MLP, Attention, RMSNorm
from qwenvl.model.rotary import Positions, scale_by_log_n

KERNELS = ("torch", "liger")


class LigerRMSNorm(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.weight.dtype:  # the plain norm promotes to the wider dtype, the kernel returns x's
            return super().forward(x)
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # "llama": float32 until the weight is applied in x's dtype, as in RMSNorm. Not in place: the incoming gradient
        # may be used elsewhere too.
        return LigerRMSNormFunction.apply(x, self.weight, self.eps, 0.0, "llama", False)


class LigerAttention(Attention):
    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, positions: Positions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from liger_kernel.ops.rope import LigerRopeFunction

        query, key = LigerRopeFunction.apply(query, key, positions.cos[:, 0], positions.sin[:, 0])
        return scale_by_log_n(query, positions), key


class LigerMLP(MLP):
    def gated(self, x: torch.Tensor) -> torch.Tensor:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(*self.gate_and_value(x))  # SiLU is applied to the first argument


FUSED: dict[type[nn.Module], type[nn.Module]] = {RMSNorm: LigerRMSNorm, Attention: LigerAttention, MLP: LigerMLP}


def use_kernels(model: nn.Module, kernels: str) -> None:
    """Switch a model's blocks to the named kernels, in place; parameters, their names and wrappers stay.

    Args:
        model: with or without adapters.
        kernels: "torch", or "liger" on a GPU.

    Raises:
        InputError: unknown kernels, or they cannot run here.
    """
    if kernels not in KERNELS:
        raise InputError(f"kernels must be one of {', '.join(KERNELS)}, not {kernels!r}")
    if kernels == "liger":
        require_liger()
    becomes = FUSED if kernels == "liger" else {fused: plain for plain, fused in FUSED.items()}
    for module in model.modules():
        if type(module) in becomes:
            module.__class__ = becomes[type(module)]


def kernels_in_use(model: nn.Module) -> str:
    """The kernels that a model's blocks use: "torch" or "liger"."""
    return "liger" if any(isinstance(module, LigerMLP) for module in model.modules()) else "torch"


def liger_runs() -> bool:
    """Whether liger-kernel is installed and the GPU can run it (Triton needs compute capability 8.0)."""
    return (
        find_spec("liger_kernel") is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (8, 0)
    )


def require_liger() -> None:
    """Check that liger-kernel can run here.

    Raises:
        InputError: liger-kernel is not installed, or there is no GPU for it.
    """
    if find_spec("liger_kernel") is None:
        raise InputError("the package liger-kernel is not installed: pip install liger-kernel, or use torch kernels")
    if not liger_runs():
        raise InputError("liger-kernel needs an NVIDIA GPU (Ampere or later), and none is here: use torch kernels")
