"""Bytes of optimizer states, for each value of TRL's `optim`, as the optimizers allocate them."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, prod

import torch

# bitsandbytes: tensors of fewer values have float32 states, and states that are not paged.
LEAST_8BIT = 4096
LEAST_PAGED = 100_000
BLOCK_8BIT = 256
CODES_8BIT = 256 * 4  # a table of 256 float32, one for signed and one for unsigned states

# States of a parameter's shape and dtype, beside the step count.
FULL_STATES = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adamw_torch_xla": 2,
    "adamw_torch_npu_fused": 2,
    "adamw_anyprecision": 2,
    "stable_adamw": 2,
    "grokadamw": 3,
    "schedule_free_adamw": 2,
    "schedule_free_radam": 2,
    "schedule_free_sgd": 1,
    "sgd": 0,
    "adagrad": 1,
    "rmsprop": 1,
    "lomo": 0,
    # An upper bound: states of the linears are low-rank, all others are Adam's.
    "galore_adamw": 2,
    "galore_adamw_layerwise": 2,
    "apollo_adamw": 2,
    "apollo_adamw_layerwise": 2,
}

# bitsandbytes: states of a parameter's shape, in 8 or 32 bits by the name.
BITSANDBYTES_STATES = {"adam": 2, "ademamix": 3, "lion": 1, "rmsprop": 1}

FACTORED = ("adafactor", "galore_adafactor", "galore_adafactor_layerwise", "adalomo")
# torchao's AdamW, two states: bytes per value, and values that share a scale.
TORCHAO = {"adamw_torch_4bit": (0.5, 128), "adamw_torch_8bit": (1.0, 256)}
COUNTS_STEPS_ON_DEVICE = ("adamw_torch_fused", "adamw_torch_npu_fused")
COUNTS_STEPS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_npu_fused", "adagrad", "rmsprop", "stable_adamw")


@dataclass(frozen=True)
class StateBytes:
    """Bytes that an optimizer allocates.

    Attributes:
        device: on the parameters' device.
        host: in host memory, with paged states, which move to the device while it has room.
        working: on the device, during a step only.
    """

    device: int = 0
    host: int = 0
    working: int = 0

    def __add__(self, other: "StateBytes") -> "StateBytes":
        return StateBytes(self.device + other.device, self.host + other.host, max(self.working, other.working))


def optimizer_states(optim: str, trained: Iterable[torch.Tensor], device_type: str) -> StateBytes:
    """What an optimizer holds after its first step.

    Args:
        optim: as in TRL's `SFTConfig`.
        trained: the parameters; only shape and dtype matter.
        device_type: cuda or cpu; on the CPU bitsandbytes pages nothing.
    """
    trained = list(trained)
    states = sum((_states(optim, parameter, device_type) for parameter in trained), StateBytes())
    if of_bitsandbytes(optim) and "8bit" in optim and any(one.numel() >= LEAST_8BIT for one in trained):
        states += StateBytes(device=CODES_8BIT * (1 if "lion" in optim or "rmsprop" in optim else 2))
    if optim in ("adamw_torch", "stable_adamw", "adagrad", "rmsprop") and device_type == "cuda":
        # PyTorch's foreach implementation holds the denominators of all parameters at once.
        states += StateBytes(working=sum(one.nbytes for one in trained))
    return states


def _states(optim: str, parameter: torch.Tensor, device_type: str) -> StateBytes:
    size = parameter.numel()
    if of_bitsandbytes(optim):
        return _bitsandbytes_states(optim, size, device_type)
    if optim in FACTORED and parameter.ndim >= 2:
        *others, rows, columns = parameter.shape
        return StateBytes(device=4 * prod(others) * (rows + columns) + 4)
    if optim in FACTORED:
        return StateBytes(device=4 * size + 4)
    if optim in TORCHAO:
        value, block = TORCHAO[optim]
        return StateBytes(device=2 * (ceil(size * value) + 4 * ceil(size / block)))
    # The step count, a float32; fused kernels read it on the device.
    step = 4 if optim in COUNTS_STEPS else 0
    on_device = device_type == "cpu" or optim in COUNTS_STEPS_ON_DEVICE
    full = FULL_STATES.get(optim, 2) * parameter.nbytes
    return StateBytes(device=full + step * on_device, host=step * (not on_device))


def of_bitsandbytes(optim: str) -> bool:
    """Whether a value of `optim` is an optimizer of bitsandbytes."""
    by_name = ("paged_", "lion_", "rmsprop_bnb", "ademamix", "adamw_bnb")
    return optim.startswith(by_name) or optim == "adamw_8bit" or optim == "galore_adamw_8bit"


def _bitsandbytes_states(optim: str, size: int, device_type: str) -> StateBytes:
    kind = next(kind for kind in ("ademamix", "adam", "lion", "rmsprop") if kind in optim)
    count = BITSANDBYTES_STATES[kind]
    scales = 0
    if "8bit" in optim and size >= LEAST_8BIT:
        values = count * size
        scales = 4 * count * ceil(size / BLOCK_8BIT)
    else:
        values = 4 * count * size
    if optim.startswith("paged_") and device_type == "cuda" and size >= LEAST_PAGED:
        return StateBytes(device=scales, host=values)
    return StateBytes(device=values + scales)
