"""Large files written past the page cache, and as usual where that is not to be had."""

import errno
import os

import pytest

from finetune.files import direct_file
from finetune.files.direct_file import PIECE_BYTES, DirectFile

FLAG = 1 << 30  # stands for direct writing, which the file system of the tests may not know


@pytest.fixture(params=["as it is", "open refuses", "write refuses"])
def file_system(request, monkeypatch):
    usual_open, usual_write, direct = os.open, os.write, set()

    def opened(path, flags, mode=0o777):
        if flags & FLAG and request.param == "open refuses":
            os.close(usual_open(path, flags & ~FLAG, mode))  # some leave the file behind
            raise OSError(errno.EINVAL, "Invalid argument")
        descriptor = usual_open(path, flags & ~FLAG, mode)
        if flags & FLAG:
            direct.add(descriptor)
        return descriptor

    def write(descriptor, content):
        if descriptor in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return usual_write(descriptor, content)

    def leave(self):
        left = self._descriptor in direct
        direct.discard(self._descriptor)
        return left

    if request.param != "as it is":
        monkeypatch.setattr(direct_file, "_DIRECT", FLAG)
        monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(os, "write", write)
        monkeypatch.setattr(DirectFile, "_write_through_the_cache", leave)


@pytest.mark.parametrize(
    "sizes", [[], [1], [4096], [10, 5000, 4095], [PIECE_BYTES], [7, PIECE_BYTES, 3], [2 * PIECE_BYTES + 5]]
)
def test_what_is_written_is_there(file_system, tmp_path, sizes):
    pieces = [bytes([65 + number]) * size for number, size in enumerate(sizes)]
    with DirectFile(tmp_path / "file", sum(sizes)) as file:
        for piece in pieces:
            file.write(memoryview(piece))
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(descriptor, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"), DirectFile(tmp_path / "file", 5) as file:
        file.write(memoryview(b"12345"))


def test_a_file_that_exists_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "file", 4)
    assert (tmp_path / "file").read_text() == "mine"
