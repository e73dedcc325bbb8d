"""Large files read past the system's page cache, into memory that is used again and again.

A checkpoint is read once from beginning to end. Through the cache the system would find and clear room for every page
of it, and copy it out again: on few cores that takes longer than the disk does.
"""

import errno
import os
from pathlib import Path

import torch

BLOCK = 4096
"""Places in the file and in memory are multiples of this, as disks and systems want it."""

SLACK = 3 * BLOCK
"""Bytes that memory must have beyond what is read."""

_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


def read_direct(path: Path, offset: int, size: int, memory: torch.Tensor) -> torch.Tensor:
    """Read a part of a file; through the page cache where the file system knows no other way.

    Args:
        offset, size: in bytes.
        memory: (at least size + SLACK,) uint8, on the CPU.

    Returns:
        (size,) uint8, a part of `memory`.

    Raises:
        EOFError: the file ends before.
    """
    before = offset % BLOCK
    start = -memory.data_ptr() % BLOCK
    blocks = memoryview(memory.numpy())[start : start + -(-(before + size) // BLOCK) * BLOCK]
    needed = before + size
    if not _read(path, offset - before, blocks, needed, _DIRECT):
        _read(path, offset - before, blocks, needed, 0)
    return memory[start + before : start + needed]


def _read(path: Path, offset: int, blocks: memoryview, needed: int, direct: int) -> bool:
    """Whether it could be done this way."""
    done = 0
    try:
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | direct)) as file:
            file.seek(offset)
            while done < needed:
                count = file.readinto(blocks[done:])
                if not count:
                    raise EOFError(f"{path} has {offset + done} bytes; {offset + needed} were asked for")
                done += count
    except OSError as error:
        if direct and error.errno == errno.EINVAL:
            return False
        raise
    return True
