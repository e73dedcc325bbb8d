"""The lock of a run folder between real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.run.folder import RunFolder
from finetune.run.lock import RunLocked

ROOT = Path(__file__).parents[3]


HOLD = """
import sys
from finetune.run.folder import RunFolder
from finetune.run.lock import RunLocked

try:
    with RunFolder(sys.argv[1]).lock():
        print("held", flush=True)
        sys.stdin.readline()
    print("released", flush=True)
except RunLocked as error:
    print(error, flush=True)
"""

# A child that outlives its killed parent, as a loader worker may.
HOLD_WITH_CHILD = """
import os, sys, time
from finetune.run.folder import RunFolder

with RunFolder(sys.argv[1]).lock():
    if os.fork() == 0:
        print("held", flush=True)
        os.close(1)
        sys.stdin.readline()
        os._exit(0)
    time.sleep(600)
"""


@pytest.fixture
def start():
    started = []

    def start(path: Path, program: str = HOLD) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(path)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_one_process_holds_it_and_the_other_names_it(run, start):
    processes = [start(run.path) for _ in range(4)]  # at the same time
    said = {process: process.stdout.readline().strip() for process in processes}
    [holder] = [process for process in processes if said[process] == "held"]
    for process in processes:
        if process is not holder:
            assert f"{run.path} is in use by process {holder.pid} on {socket.gethostname()} since 20" in said[process]
            assert "choose another output" in said[process]
    with pytest.raises(RunLocked) as error, run.lock():
        pass
    assert error.value.holder["pid"] == holder.pid
    assert sys.executable in error.value.holder["command"]
    holder.communicate("\n")
    with run.lock():
        pass


def test_a_killed_process_holds_nothing(run, start):
    first = start(run.path)
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.wait()
    assert json.loads(run.lock_file.read_text())["pid"] == first.pid  # what is left means nothing
    second = start(run.path)
    assert second.stdout.readline() == "held\n"
    third = start(run.path)
    assert f"process {second.pid} on" in third.stdout.readline()


def test_a_stopped_process_still_holds_it(run, start):
    first = start(run.path)
    assert first.stdout.readline() == "held\n"
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(RunLocked, match=f"process {first.pid}"), run.lock():
        pass


def test_children_of_a_killed_process_hold_nothing(run, start):
    first = start(run.path, HOLD_WITH_CHILD)
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.wait()
    with run.lock():  # the child lives until its standard input is closed
        pass


def test_the_lock_ends_with_the_block(run):
    for error in (None, RuntimeError, KeyboardInterrupt):
        try:
            with run.lock():
                with pytest.raises(RunLocked, match=f"process {os.getpid()}"), run.lock():
                    pass
                if error:
                    raise error
        except (RuntimeError, KeyboardInterrupt) as caught:
            assert type(caught) is error
    assert run.lock_file.read_text() == ""


def test_a_holder_who_has_not_written_yet(run, monkeypatch):
    """Between the taking of the lock and the writing of the name the file is empty, or names someone dead."""
    monkeypatch.setattr("finetune.run.lock.HOLDER_WAIT", 0.05)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for text in ("", json.dumps({"pid": ended.pid, "host": socket.gethostname(), "since": "then", "command": "x"})):
        with run.lock():
            run.lock_file.write_text(text)
            with pytest.raises(RunLocked, match="is in use by"), run.lock():
                pass


def test_the_name_of_a_dead_holder_is_not_given(run, monkeypatch):
    """The new holder writes its name a moment after it took the lock."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    looks = []

    def sleep(_):
        looks.append(run.lock_file.read_text())
        run.lock_file.write_text(mine)

    monkeypatch.setattr("time.sleep", sleep)
    with run.lock():
        mine = run.lock_file.read_text()
        run.lock_file.write_text(mine.replace(f'"pid": {os.getpid()},', f'"pid": {ended.pid},'))
        with pytest.raises(RunLocked, match=f"process {os.getpid()} on"), run.lock():
            pass
    assert [json.loads(text)["pid"] for text in looks] == [ended.pid]


def test_only_the_main_process_locks(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    with run.lock(), run.lock():
        assert not run.path.exists()
    monkeypatch.setenv("RANK", "0")
    with run.lock():
        assert run.lock_file.exists()
