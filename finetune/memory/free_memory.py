"""Memory that a run can plan with: what is free on its GPU or host, and what usual GPUs offer.

Host memory is bounded by the limit of the container, where there is one.
"""

import os
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")
"""Control group, version 2, of this process as a container sees it."""

CONTEXT = 500_000_000
"""Bytes of a GPU that CUDA and its libraries take before anything is loaded."""

USABLE = 0.95
"""Share of the free memory that a run can plan with; the rest is lost to fragmentation."""

SIZES = (6, 8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180)
CARDS = {size: int((size * 1_000_000_000 - CONTEXT) * USABLE) for size in SIZES}
"""Usual GPUs by their size in GB, and the bytes of each that a run can plan with."""


def device_type() -> str:
    """Where a run computes: cuda or cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_device_memory() -> int:
    """Free bytes of this process's GPU; without a GPU, of the host."""
    if not torch.cuda.is_available():
        return free_host_memory()
    free, _ = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))
    return free


def free_host_memory(cgroup: Path = CGROUP) -> int:
    """Bytes of host memory that can be allocated without swapping, and without the container being killed."""
    available: int = psutil.virtual_memory().available
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        kinds = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no limit: the file does not exist, or says max
        return available
    # The page cache counts as used, and is reclaimed first.
    return max(0, min(available, limit - used + int(kinds.get("inactive_file", 0))))


def host_memory(cgroup: Path = CGROUP) -> int:
    """All bytes of this machine's memory, or the container's limit if that is less."""
    whole: int = psutil.virtual_memory().total
    try:
        limit = (cgroup / "memory.max").read_text().strip()
    except OSError:  # no control groups of version 2
        return whole
    return whole if limit == "max" else min(whole, int(limit))


def describe_cards(peak: int) -> str:
    """The smallest of the usual GPUs that a run fits, in words.

    Args:
        peak: bytes that the run needs on its device (`MemoryPlan.peak`); a plan made for a CPU differs a little.
    """
    fitting = [size for size, usable in CARDS.items() if peak <= usable]
    return f"fits a GPU of {fitting[0]} GB or more" if fitting else f"fits no GPU of up to {max(CARDS)} GB"
