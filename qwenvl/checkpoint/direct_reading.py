"""Read large files into memory that is reused: with O_DIRECT, without the system's page cache, or through it.

A checkpoint that is merged or exported is read once from beginning to end. With the page cache, the system would
allocate and clear a page for each block and copy it out again: on few cores that takes longer than the disk itself. A
checkpoint that is hashed is loaded next, by one or several processes, or was read a moment ago: there the cache saves
the disk.
"""

import errno
import os
from pathlib import Path

import torch

BLOCK = 4096
"""Offsets in the file and addresses in memory are multiples of this, as O_DIRECT requires."""

SLACK = 3 * BLOCK
"""Bytes of memory needed in addition to what is read."""

_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux only


def read_direct(path: Path, offset: int, size: int, memory: torch.Tensor) -> torch.Tensor:
    """Read a part of a file, with O_DIRECT if the file system supports it.

    Args:
        offset, size: in bytes.
        memory: (at least size + SLACK,) uint8, on the CPU.

    Returns:
        (size,) uint8, a part of `memory`.

    Raises:
        EOFError: the file ends before `offset + size`.
    """
    before = offset % BLOCK
    start = -memory.data_ptr() % BLOCK
    blocks = memory.numpy().data[start : start + -(-(before + size) // BLOCK) * BLOCK]
    needed = before + size
    if not _read(path, offset - before, blocks, needed, _DIRECT):
        _read(path, offset - before, blocks, needed, 0)
    return memory[start + before : start + needed]


def read_through_cache(path: Path, offset: int, size: int, memory: torch.Tensor) -> torch.Tensor:
    """As `read_direct`, through the system's page cache."""
    _read(path, offset, memory.numpy().data[:size], size, 0)
    return memory[:size]


def _read(path: Path, offset: int, blocks: memoryview, needed: int, direct: int) -> bool:
    """Fill `blocks` up to `needed` bytes; returns False if the file system does not support O_DIRECT."""
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
