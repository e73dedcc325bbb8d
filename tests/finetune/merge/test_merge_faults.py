"""Merges that fail or are killed, at every operation on files: nothing partial has the final name."""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
from adapters_for_tests import make_adapter
from forked_finetune import run_forked

from finetune.errors import Failed, Interrupted, UserError
from finetune.merge.folder import MERGE_FILE
from finetune.merge.merge import merge
from finetune.terminal import say_nothing

OPERATIONS = ("write", "fsync", "rename", "replace", "mkdir")
SETTINGS = {"check": False, "shard_bytes": 3e6}


@pytest.fixture
def adapter(tmp_path):
    make_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """A hundred merges here; that what is written is synced, test_tensor_files.py sees to."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Strike:
    """Fails the n-th of the counted operations; counts them all."""

    def __init__(self, monkeypatch, at: int | None, failure: BaseException):
        self.count = 0
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name), at, failure))

    def _counted(self, operation, at, failure):
        def run(*arguments, **settings):
            self.count += 1
            if self.count == at:
                raise failure
            return operation(*arguments, **settings)

        return run


def operations_of_a_merge(adapter, to):
    with pytest.MonkeyPatch.context() as patch:
        strike = Strike(patch, None, OSError())
        merge(adapter, to, say=say_nothing, **SETTINGS)
    return strike.count


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("there", [False, True])
def test_a_failing_disk_leaves_what_was_there(adapter, tmp_path, there):
    to, whole, failures = tmp_path / "to", tmp_path / "whole", 0
    count = operations_of_a_merge(adapter, whole) + 5 * there  # replacing takes some more
    before = None
    for at in range(1, count + 1):
        if there and before is None:
            merge(adapter, to, dtype="bfloat16", overwrite=True, say=say_nothing, **SETTINGS)
            before = content(to)
        with pytest.MonkeyPatch.context() as patch:
            Strike(patch, at, OSError(errno.ENOSPC, "No space left on device"))
            try:
                merge(adapter, to, overwrite=there, say=say_nothing, **SETTINGS)
            except Failed as error:
                assert "could not be written: [Errno 28]" in str(error)
                failures += 1
            except UserError as error:  # by the attempt that is made first
                assert f"cannot write the merged model to {to}: the disk is full" in str(error)
                failures += 1
        if to.exists() and content(to) != before:
            # Nothing was lost by that failure (making a folder that is there, deleting the old one), or only the last
            # step, the sync of the renaming, failed.
            assert content(to) == content(whole), at
            before = None
            if not there:
                shutil.rmtree(to)
        assert to.exists() == there
        assert not [path for path in tmp_path.iterdir() if ".partial-" in path.name], at
    assert failures >= count - 8


@pytest.mark.parametrize("stop", [Interrupted(signal.SIGTERM, saved=False), KeyboardInterrupt()])
def test_a_stopped_merge_leaves_nothing(adapter, tmp_path, stop):
    with pytest.MonkeyPatch.context() as patch:
        Strike(patch, 12, stop)
        with pytest.raises(type(stop)):
            merge(adapter, tmp_path / "to", say=say_nothing, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


KILLED = """\
import os, signal, sys
from finetune.merge.merge import merge

writes = 0
write = os.write

def counted(*arguments):
    global writes
    writes += 1
    if writes == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)

os.write = counted
merge(sys.argv[1], sys.argv[2], check=False, shard_bytes=3e6)
"""


def test_a_killed_merge_leaves_nothing_under_the_name_and_the_next_cleans_up(adapter, tmp_path):
    to, program = tmp_path / "to", tmp_path / "killed.py"
    program.write_text(KILLED)
    done = run_forked([adapter, to], timeout=120, program=program)
    assert done.returncode == -signal.SIGKILL, done.stderr
    program.unlink()
    (partial,) = [path for path in tmp_path.iterdir() if path.name != "adapter"]
    assert partial.name.startswith(".to.partial-")
    merge(adapter, to, say=say_nothing, **SETTINGS)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "to"}
    assert (to / MERGE_FILE).is_file()
