"""Bytes that this process could still take: of its GPU, or of the host within the limit of its container."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    from finetune.memory.plan import MemoryPlan

CGROUP = Path("/sys/fs/cgroup")
"""Of version 2: as a container sees it, its own."""


def device_type() -> str:
    """Where a run computes: cuda or cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_device_memory() -> int:
    """Of this process's GPU, less what others on it hold; on the CPU, of the host."""
    if not torch.cuda.is_available():
        return free_host_memory()
    free, _ = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))
    return free


def free_host_memory(cgroup: Path = CGROUP) -> int:
    """What can be taken without anything being swapped out or killed."""
    available = psutil.virtual_memory().available
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        kinds = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no limit: there is no such file, or it says max
        return available
    # Pages of files count as used, and are given up first.
    return max(0, min(available, limit - used + int(kinds.get("inactive_file", 0))))


CONTEXT = 500_000_000
"""Bytes of a GPU that CUDA and its libraries take before anything is loaded."""

USABLE = 0.95
"""Share of what is left that a run can plan with; the rest is in pieces between others, too small for what comes."""

CARDS = {size: int((size * 1_000_000_000 - CONTEXT) * USABLE) for size in (6, 8, 12, 16, 24, 40, 48, 80)}
"""Usual cards by their size in GB, and the bytes of each that a run can plan with."""


def fitting_cards(plan: "MemoryPlan") -> list[int]:
    """Sizes in GB of the usual cards that a plan fits."""
    return [size for size, usable in CARDS.items() if plan.fits(usable)]


def describe_cards(plan: "MemoryPlan") -> str:
    """In words; what is planned for a CPU is a little other there."""
    fitting = fitting_cards(plan)
    return f"fits a GPU of {fitting[0]} GB or more" if fitting else f"fits no GPU of up to {max(CARDS)} GB"
