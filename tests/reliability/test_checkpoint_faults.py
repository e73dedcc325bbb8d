"""Saving under attack: killed at, and failed in, every file operation.

Damage to what was saved: test_checkpoint_damage.py.

The operations are counted by wrapping those of `os` and of opened files, in this process for errors and in forked
children of a small process (this file run as a program) for SIGKILL.
"""

import builtins
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune.files.atomic_writes import HIDDEN_NAME
from finetune.run.checkpoints import checkpoint_path, clean_partials, find_last_good, prune, step_of, verify, writing
from finetune.run.folder import RunFolder

OS_OPERATIONS = ("open", "fsync", "rename", "replace", "unlink", "remove", "rmdir", "mkdir")
FILE_OPERATIONS = ("write", "read", "readinto", "truncate", "flush")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Hundreds of saves here; what is synced, and when, tests/finetune/run/test_checkpoints.py sees to."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


# The attack


class CountedFile:
    """An opened file whose operations are counted; a failing write writes its first half."""

    def __init__(self, file, strike: Callable):
        self._file = file
        self._strike = strike

    def __getattr__(self, name):
        operation = getattr(self._file, name)
        if name not in FILE_OPERATIONS:
            return operation

        def counted(*arguments):
            def half():
                if name == "write" and len(arguments[0]) > 1:
                    self._file.write(arguments[0][: len(arguments[0]) // 2])
                    self._file.flush()

            self._strike(name, half)
            return operation(*arguments)

        return counted

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


@contextmanager
def strikes(first: int, act: Callable[[str], None], last: int | None = None) -> Iterator[list[str]]:
    """Call `act(operation)` instead of the `first`-th file operation of the block (and those up to the `last`-th).

    Yields:
        The names of the operations so far.
    """
    last = first if last is None else last
    seen: list[str] = []
    counting = threading.Lock()

    def strike(name: str, before: Callable[[], object] = lambda: None):
        with counting:  # files are hashed in threads
            seen.append(name)
            number = len(seen)
        if first <= number <= last:
            before()
            act(name)

    def counted(name, operation):
        def replacement(*arguments, **options):
            strike(name)
            return operation(*arguments, **options)

        return replacement

    def counted_open(*arguments, **options):
        strike("open file")
        return CountedFile(plain_open(*arguments, **options), strike)

    plain_open = builtins.open
    plain = {name: getattr(os, name) for name in OS_OPERATIONS}
    try:
        builtins.open = io.open = counted_open
        for name, operation in plain.items():
            setattr(os, name, counted(name, operation))
        yield seen
    finally:
        builtins.open = io.open = plain_open
        for name, operation in plain.items():
            setattr(os, name, operation)


# What is attacked: each prepares a run folder, then does one thing to it


def content(step: int, version: str) -> dict[str, bytes]:
    return {
        "adapter_model.safetensors": f"weights {step} {version} ".encode() * 300,
        "optimizer.pt": f"moments {step} {version} ".encode() * 500,
        "rank-1/rng_state.pth": f"random {step} {version}".encode(),
    }


def save(run: RunFolder, step: int, version: str):
    with writing(checkpoint_path(run.checkpoints, step)) as partial:
        (partial / "rank-1").mkdir()
        for name, data in content(step, version).items():
            with (partial / name).open("wb") as file:
                file.write(data)


def versions(folder: Path, step: int) -> list[str]:
    """Which of the versions "old" and "new" a checkpoint is, byte for byte."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found.pop("manifest.json")
    return [version for version in ("old", "new") if found == content(step, version)]


def prepare_one(run: RunFolder):
    save(run, 10, "old")


def prepare_two(run: RunFolder):
    save(run, 10, "old")
    save(run, 20, "old")


def prepare_three(run: RunFolder):
    for step in (5, 10, 20):
        save(run, step, "old")


def prepare_cut_short(run: RunFolder):
    """As left by a process killed while replacing step 20, and others killed while writing and deleting."""
    prepare_three(run)
    folder = run.checkpoints
    (folder / "step-20").rename(folder / ".step-20.replaced-00000000")
    shutil.copytree(folder / "step-10", folder / ".step-10.replaced-00000000")
    (folder / "step-5").rename(folder / ".step-5.removed-00000000")
    (folder / ".step-30.partial-00000000").mkdir()
    (folder / ".step-30.partial-00000000" / "optimizer.pt").touch()


def save_twenty(run: RunFolder):
    save(run, 20, "new")


ATTACKED = {
    "save": (prepare_one, save_twenty),
    "replace": (prepare_two, save_twenty),
    "prune": (prepare_three, lambda run: prune(run.checkpoints, 1)),
    "clean": (prepare_cut_short, lambda run: clean_partials(run.checkpoints)),
}


def check_state(name: str, run: RunFolder, done: bool) -> str:
    """What must hold of the checkpoints at any time; `done` where the attacked function has returned.

    Returns:
        Which state it is: "step version".
    """
    found = find_last_good(run.checkpoints)
    assert found.damaged == []
    [version] = versions(found.path, found.step)
    allowed = {"save": ["10 old", "20 new"], "replace": ["20 old", "20 new"]}.get(name, ["20 old"])
    state = f"{found.step} {version}"
    assert state in allowed
    if done:
        assert state == allowed[-1]
    for path in run.checkpoints.iterdir():
        if step_of(path) is not None:
            if path != found.path:  # that one is verified
                verify(path)
        else:
            assert HIDDEN_NAME.fullmatch(path.name)
    return state


def check_recovery(name: str, run: RunFolder):
    """The next start: cleaning loses nothing, leaves final names alone, and saving works again."""
    before = find_last_good(run.checkpoints)
    [version] = versions(before.path, before.step)
    clean_partials(run.checkpoints)
    after = find_last_good(run.checkpoints)
    assert (after.step, versions(after.path, after.step)) == (before.step, [version])
    assert after.path == checkpoint_path(run.checkpoints, after.step)
    assert all(step_of(path) is not None for path in run.checkpoints.iterdir())
    assert checkpoint_path(run.checkpoints, 10).exists() or name == "prune"
    save(run, 20, "new")
    assert versions(find_last_good(run.checkpoints).path, 20) == ["new"]


# Killed


def kill_at_every_operation(root: Path, prepare: Callable, attacked: Callable) -> int:
    """Into root/1, root/2, ...: the state after a SIGKILL at the n-th operation; the last one is not killed.

    Runs in a process of its own: it forks.
    """
    prepare(RunFolder(root / "prepared"))
    n = 0
    while True:
        n += 1
        run = RunFolder(root / str(n))
        shutil.copytree(root / "prepared", run.path)
        child = os.fork()
        if child == 0:
            with strikes(n, lambda _: os.kill(os.getpid(), signal.SIGKILL)):
                attacked(run)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0, "the attacked function failed by itself"
            return n
        assert os.WTERMSIG(status) == signal.SIGKILL


def write_second_run(run: RunFolder):
    run.write_run({"version": "new"})


def forget(run: RunFolder):
    run.forget_metrics_after(1)


FILES_ATTACKED = {"run.json": write_second_run, "metrics.jsonl": forget, "append": lambda run: append(run, 4)}


def prepare_files(run: RunFolder):
    run.write_run({"version": "old"})
    for step in (1, 2, 3):
        append(run, step)


def append(run: RunFolder, step: int):
    run.append_metrics({"step": step, "loss": 1 / step})


def in_its_own_process(root: Path, name: str) -> int:
    command = [sys.executable, __file__, str(root), name]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("name", ATTACKED)
def test_killed_at_every_operation(tmp_path, name):
    count = in_its_own_process(tmp_path, name)
    assert count > 25
    states = []
    for n in range(1, count + 1):
        run = RunFolder(tmp_path / str(n))
        states.append(check_state(name, run, done=n == count))
        check_recovery(name, run)
    changes = [n for n in range(1, count) if states[n] != states[n - 1]]
    assert len(changes) == (1 if name in ("save", "replace") else 0)  # once new, it stays new


def test_files_killed_at_every_operation(tmp_path):
    seen = {}
    for name in FILES_ATTACKED:
        root = tmp_path / name
        root.mkdir()
        count = in_its_own_process(root, name)
        assert count > 3
        for n in range(1, count + 1):
            run = RunFolder(root / str(n))
            state = (run.read_run()["version"], tuple(record["step"] for record in run.read_metrics()))
            seen.setdefault(name, set()).add(state)
            append(run, 9)
            assert [record["step"] for record in run.read_metrics()] == [*state[1], 9]
    assert seen == {
        "run.json": {("old", (1, 2, 3)), ("new", (1, 2, 3))},
        "metrics.jsonl": {("old", (1, 2, 3)), ("old", (1,))},
        "append": {("old", (1, 2, 3)), ("old", (1, 2, 3, 4))},
    }


# Failed


def failing_with(number: int) -> Callable[[str], None]:
    def act(_):
        raise OSError(number, os.strerror(number))

    return act


def interrupted(_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ATTACKED)
@pytest.mark.parametrize(
    ("act", "error", "lasting"),
    [
        (failing_with(errno.ENOSPC), OSError, False),
        (failing_with(errno.EIO), OSError, False),
        (failing_with(errno.EIO), OSError, True),
        (interrupted, KeyboardInterrupt, False),
    ],
    ids=["ENOSPC", "EIO", "EIO from then on", "interrupted"],
)
def test_failed_at_every_operation(tmp_path, name, act, error, lasting):
    prepare, attacked = ATTACKED[name]
    prepare(RunFolder(tmp_path / "prepared"))
    new_in_spite_of_error, n, done, errors = 0, 0, False, 0
    while not done:
        n += 1
        run = RunFolder(tmp_path / str(n))
        shutil.copytree(tmp_path / "prepared", run.path)
        raised = None
        with strikes(n, act, last=sys.maxsize if lasting else n) as seen:
            try:
                attacked(run)
            except error as caught:
                raised = caught
        done = len(seen) < n
        errors += raised is not None
        state = check_state(name, run, done=raised is None)
        if name in ("save", "replace"):
            assert versions(checkpoint_path(run.checkpoints, 10), 10) == ["old"]
        if raised is not None and name in ("save", "replace"):
            if isinstance(raised, OSError):
                assert raised.errno in (errno.ENOSPC, errno.EIO)
            new_in_spite_of_error += state == "20 new"
            if not lasting:
                assert not list(run.checkpoints.glob(".*.partial-*"))
                assert checkpoint_path(run.checkpoints, 20).exists() or name == "save"
        check_recovery(name, run)
        shutil.rmtree(run.path)
    assert n > 25
    assert errors > n // 2 or name in ("prune", "clean")
    # Only the fsync of the folder (open, fsync) comes after the renaming and can still raise; an interrupt can as well
    # while the old one is deleted.
    assert new_in_spite_of_error <= 2 or error is KeyboardInterrupt


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_files_failed_at_every_operation(tmp_path, number):
    for name, attacked in FILES_ATTACKED.items():
        n, done = 0, False
        while not done:
            n += 1
            run = RunFolder(tmp_path / name / str(n))
            prepare_files(run)
            with strikes(n, failing_with(number)) as seen:
                try:
                    attacked(run)
                except OSError as error:
                    assert error.errno == number
            done = len(seen) < n
            assert run.read_run()["version"] in ("old", "new")
            assert [record["step"] for record in run.read_metrics()] in ([1, 2, 3], [1], [1, 2, 3, 4])
            assert sorted(path.name for path in run.path.iterdir()) == ["metrics.jsonl", "run.json"]
        assert n > 3


if __name__ == "__main__":
    folder, scenario = sys.argv[1:]
    os.fsync = lambda _: None
    pair = ATTACKED[scenario] if scenario in ATTACKED else (prepare_files, FILES_ATTACKED[scenario])
    print(json.dumps(kill_at_every_operation(Path(folder), *pair)))
