"""Parts of files read past the page cache, and as usual where that is not to be had."""

import errno
import os

import pytest
import torch

from qwenvl.checkpoint import direct_reading
from qwenvl.checkpoint.direct_reading import BLOCK, SLACK, read_direct

CONTENT = bytes(range(251)) * 100  # 25,100 bytes, not a whole number of blocks


@pytest.fixture(params=["direct", "refused"])
def file(request, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    if request.param == "refused":
        usual = os.open

        def refuse(name, flags):
            if flags & 1 << 30:
                raise OSError(errno.EINVAL, "Invalid argument")
            return usual(name, flags)

        monkeypatch.setattr(direct_reading, "_DIRECT", 1 << 30)
        monkeypatch.setattr(os, "open", refuse)
    return path


@pytest.mark.parametrize("offset", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("size", [1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_any_part_is_read(file, offset, size):
    for shift in (0, 64, 1000):  # memory may begin anywhere
        memory = torch.full((shift + size + SLACK,), 7, dtype=torch.uint8)[shift:]
        content = read_direct(file, offset, size, memory)
        assert bytes(content.numpy()) == CONTENT[offset : offset + size]
        assert memory.data_ptr() <= content.data_ptr() <= memory.data_ptr() + len(memory) - size


def test_the_end_of_the_file(file):
    memory = torch.empty(100 + SLACK, dtype=torch.uint8)
    assert bytes(read_direct(file, len(CONTENT) - 100, 100, memory).numpy()) == CONTENT[-100:]
    with pytest.raises(EOFError, match="has 25100 bytes; 25101 were asked for"):
        read_direct(file, len(CONTENT) - 99, 100, memory)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_direct(tmp_path / "none", 0, 1, torch.empty(1 + SLACK, dtype=torch.uint8))
