"""A device's peak arithmetic: dense 16-bit matrix products accumulated in float32, from data sheets or measured."""

import re
import time
from typing import NamedTuple

import torch

DATA_SHEETS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("B200",), 2250),
    (("H100", "PCIe"), 756),
    (("H100", "NVL"), 835),
    (("H100",), 989),
    (("H200",), 989),
    (("H800",), 989),
    (("GH200",), 989),
    (("H20",), 148),
    (("A100",), 312),
    (("A800",), 312),
    (("A40",), 150),
    (("A30",), 165),
    (("A10",), 125),
    (("A10G",), 70),
    (("A6000",), 155),
    (("RTX", "6000", "Ada"), 364),
    (("L40S",), 362),
    (("L40",), 181),
    (("L4",), 121),
    (("5090",), 209.5),
    (("4090",), 165),
    (("4080",), 97.5),
    (("3090", "Ti"), 80),
    (("3090",), 71),
    (("3080",), 59.5),
)
"""Words of a device's name -> dense TFLOP/s in bfloat16 and float16, from NVIDIA's data sheets and architecture
whitepapers. (Data sheets often print the double, which holds for 2:4 sparse matrices.) The first match counts."""

OTHER_CARDS = {"Laptop", "Max", "Mobile", "D", "MIG", "SUPER", "Ti"}
"""Words that mark a faster or slower variant of a card."""

SIDE = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the matrices that are multiplied if there is no data sheet."""

REPEATS = 10


class Peak(NamedTuple):
    """Most floating point operations per second, and the source of the number."""

    flops: float
    source: str


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The data sheet's peak for a known GPU computing in 16 bits; for anything else a measurement."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        known = data_sheet(torch.cuda.get_device_name(device))
        if known is not None:
            return Peak(known * 1e12, "data sheet, dense 16 bits")
    name = str(dtype).removeprefix("torch.")
    what = f"products of two {SIDE[device.type]} x {SIDE[device.type]} {name} matrices"
    return Peak(measure(device, dtype), f"measured: the fastest of {REPEATS} {what}")


def data_sheet(name: str) -> float | None:
    """TFLOP/s of a card by its name as the driver gives it; None if it is not in the table.

    >>> data_sheet("NVIDIA A100-SXM4-80GB")
    312
    """
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    for needed, speed in DATA_SHEETS:
        if words.issuperset(needed):
            return None if words & OTHER_CARDS - set(needed) else speed
    return None


def measure(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, the best of `REPEATS`."""
    side = SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS):
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
