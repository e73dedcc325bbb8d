"""Rotary positions, RMSNorm and SwiGLU each in one GPU kernel, from liger-kernel, in place of PyTorch's operations.

The plain modules of `language` say what is computed; these agree with them to the rounding of the type.
"""

from importlib.util import find_spec

import torch
from torch import nn

from qwenvl.model.language import MLP, Attention, RMSNorm
from qwenvl.model.rotary import Positions, scale_by_log_n

KERNELS = ("torch", "liger")


class LigerRMSNorm(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.weight.dtype:  # the plain norm's result is in the wider of the two, the kernel's in x's
            return super().forward(x)
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # "llama": float32 up to the weight, which multiplies in x's type, as here. Not in place: the gradient that
        # would be overwritten may be somebody else's too.
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

        return LigerSiLUMulFunction.apply(self.w2(x), self.w1(x))  # the first goes through the sigmoid


FUSED = {RMSNorm: LigerRMSNorm, Attention: LigerAttention, MLP: LigerMLP}


def use_kernels(model: nn.Module, kernels: str):
    """Compute a model's blocks with the kernels named, from now on; its parameters, names and wrappers stay.

    Args:
        model: with or without adapters on it.
        kernels: "torch", or "liger" on a GPU.

    Raises:
        ValueError: there are no such kernels, or they cannot run here.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, not {kernels!r}")
    if kernels == "liger":
        require_liger()
    becomes = FUSED if kernels == "liger" else {fused: plain for plain, fused in FUSED.items()}
    for module in model.modules():
        if type(module) in becomes:
            module.__class__ = becomes[type(module)]


def kernels_in_use(model: nn.Module) -> str:
    """ "torch" or "liger"."""
    return "liger" if any(isinstance(module, LigerMLP) for module in model.modules()) else "torch"


def liger_runs() -> bool:
    """Whether liger-kernel is installed and there is a GPU that runs it (its Triton needs compute capability 8.0)."""
    return (
        find_spec("liger_kernel") is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (8, 0)
    )


def require_liger():
    """Raises:
    ValueError: liger-kernel is not installed, or there is no GPU for it.
    """
    if find_spec("liger_kernel") is None:
        raise ValueError("the package liger-kernel is not installed: pip install liger-kernel, or take torch kernels")
    if not liger_runs():
        raise ValueError("liger-kernel runs on an NVIDIA GPU (Ampere or later), and none is here: take torch kernels")
