"""Bytes that this process could still take: of its GPU, or of the host within the limit of its container."""

import os
from pathlib import Path

import psutil
import torch

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
