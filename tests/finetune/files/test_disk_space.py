"""Whether a disk has room for what is about to be written."""

import errno

import pytest

from finetune.files.disk_space import NotEnoughDiskSpace, check_disk_space


def test_disk_space(tmp_path):
    folder = tmp_path / "not" / "yet"
    check_disk_space(folder, 1, "the checkpoints")
    with pytest.raises(
        NotEnoughDiskSpace, match=r"not/yet: [0-9.]+ [GT]B are free, but [0-9.]+ [A-Z]B are needed"
    ) as error:
        check_disk_space(folder, 10**18, "the checkpoints")
    assert error.value.errno == errno.ENOSPC
    assert isinstance(error.value, OSError)
    assert not folder.exists()


def test_disk_space_from_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_disk_space("runs/first", 1, "the checkpoints")
