"""Full training in 16 bits: trained parameters are float32 masters, and a step computes with 16-bit copies of them.

The update of a weight is often smaller than half the distance between two 16-bit values: added to a weight of 16 bits
it is lost. So the optimizer works on float32 masters. Forward and backward run on copies of them in the computing
dtype, as under FSDP2's `MixedPrecisionPolicy`: the model computes what the saved 16-bit model would, with the same
kernels and activations. Autocast would instead make the residual stream, the norms and the logits float32.

The gradients of all packs of a step are summed in float32, in the masters' `grad`: clipping, averaging over processes,
loss scaling and the optimizer find them there.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

MASTER = torch.float32


def make_masters(model: nn.Module) -> None:
    """Make trained 16-bit parameters float32, in place, one after the other."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, MASTER))


@contextlib.contextmanager
def rounded_masters(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, the model's masters are rounded to `dtype`; a backward adds to the gradients of the masters.

    The copies live as long as the block: they take memory in forward and backward, and none in the optimizer's step.
    Recomputed activations need them too, so a backward belongs into the block of its forward.

    Args:
        model: with or without wrappers. Outside of the block it has its masters.
        dtype: that the frozen weights are in. None, or float32, leaves the model as it is.
    """
    copies: dict[int, nn.Parameter] = {}
    places: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
    if dtype is not None and dtype.itemsize < MASTER.itemsize:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad and parameter.dtype == MASTER:
                    places.append((module._parameters, name, parameter))
    try:
        for parameters, name, master in places:
            if id(master) not in copies:
                copies[id(master)] = _copy_of(master, dtype)
            parameters[name] = copies[id(master)]
        yield
    finally:
        for parameters, name, master in places:
            parameters[name] = master


def copy_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the copies that `rounded_masters` makes."""
    if dtype.itemsize >= MASTER.itemsize:
        return 0
    masters = (one for one in model.parameters() if one.requires_grad and one.dtype == MASTER)
    return sum(one.numel() for one in masters) * dtype.itemsize


def _copy_of(master: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    copy = nn.Parameter(master.detach().to(dtype))

    def add_to_master(copy: torch.Tensor) -> None:
        gradient, copy.grad = copy.grad, None
        assert gradient is not None, "called when the gradient is there"
        if master.grad is None:
            master.grad = gradient.to(MASTER)
        else:
            master.grad.add_(gradient)

    copy.register_post_accumulate_grad_hook(add_to_master)
    return copy
