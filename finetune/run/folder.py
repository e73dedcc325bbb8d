"""The run folder: what a run writes about itself, and the lock that keeps a second run out of it."""

import contextlib
import errno
import json
import logging
import math
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

from finetune.errors import UserError
from finetune.files.atomic_writes import make_folder, write_text
from finetune.quantities import format_bytes

logger = logging.getLogger(__name__)

PACKAGES = ("qwenvl-finetune", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
# JSON has no such numbers; these are the names that Protocol Buffers' JSON and JavaScript give them.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
HOLDER_WAIT = 5.0  # seconds that a second process waits for the first to have written who it is


class RunLocked(UserError):
    """Another process has the run folder.

    Attributes:
        holder: its `pid`, `host`, `since` (ISO 8601) and `command`; empty where it has not written them.
    """

    def __init__(self, folder: Path, holder: dict):
        who = "another process"
        if holder:
            who = "process {pid} on {host} since {since} ({command})".format_map(holder)
        super().__init__(f"{folder} is in use by {who}: wait until it is done, stop it, or choose another output")
        self.holder = holder


class NotEnoughDiskSpace(OSError):
    """Free space would not hold what is about to be written."""

    def __init__(self, message: str):
        super().__init__(message)
        self.errno = errno.ENOSPC


class RunFolder:
    """The folder of one run.

    | name | what |
    |---|---|
    | `recipe.yaml` | the recipe as it was resolved: file, defaults and overrides |
    | `run.json` | versions, fingerprints, state; its `identity` decides whether a resume continues the same run |
    | `metrics.jsonl` | one JSON object a line, each with its `step` |
    | `checkpoints/step-N/` | state after N optimizer steps, with a manifest (`checkpoints.py`) |
    | `adapter/` | the result, in PEFT's format |
    | `report.html` | the run to look at |
    | `run.lock` | held while a process trains here |
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.run_file = self.path / "run.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.report_file = self.path / "report.html"
        self.lock_file = self.path / "run.lock"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run folder; it is created if need be.

        The operating system ends the hold with the process, however that ends: there is no stale lock, the file stays
        and means nothing by itself. In a distributed run (`RANK` set by the launcher) the main process holds it for
        all, elsewhere this does nothing.

        Raises:
            RunLocked: another process holds it; says which.
            OSError: the file system has no locks.
        """
        if os.environ.get("RANK", "0") != "0":
            yield
            return
        make_folder(self.path)
        with self.lock_file.open("ab+", buffering=0) as file:
            _locked_files.add(file)
            try:
                if not _try_lock(file):
                    raise RunLocked(self.path, _read_holder(self.lock_file))
                file.truncate(0)
                file.write(json.dumps(_this_process()).encode())
                try:
                    yield
                finally:
                    if not file.closed:  # in a forked child it is
                        with contextlib.suppress(OSError):
                            file.truncate(0)
            finally:
                _locked_files.discard(file)

    def write_recipe(self, text: str):
        """Write `recipe.yaml`, atomically."""
        make_folder(self.path)
        write_text(self.recipe_file, text)

    def write_run(self, run: dict):
        """Write `run.json`, atomically. Values are JSON's; non-finite numbers as in `append_metrics`."""
        make_folder(self.path)
        write_text(self.run_file, _json(run, indent=2) + "\n")

    def read_run(self) -> dict | None:
        """What `run.json` says; None where no run was started in this folder.

        Raises:
            ValueError: it is not JSON.
        """
        try:
            text = self.run_file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            return _with_floats(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{self.run_file} is not JSON ({error}): restore it, or start the run anew") from None

    def append_metrics(self, record: dict):
        """Add a line to `metrics.jsonl`, in one write: a killed process leaves at most a half last line.

        Every line is valid JSON for every reader: NaN and the infinities become the strings "NaN", "Infinity" and
        "-Infinity" (null would hide whether a loss overflowed or was not a number). `read_metrics` turns them back.
        """
        with self.metrics_file.open("ab+", buffering=0) as file:
            _cut_half_line(file)
            file.write((_json(record) + "\n").encode())

    def read_metrics(self) -> list[dict]:
        """The records of `metrics.jsonl`; a half last line (a killed process) is left out and logged.

        Raises:
            ValueError: another line is not a JSON object; gives its number.
        """
        return [record for _, record in self._metrics_lines()]

    def forget_metrics_after(self, step: int) -> int:
        """Drop the records of later steps, which a run that resumes at `step` will write again; atomically.

        Returns:
            How many were dropped. Records without a `step` stay.
        """
        lines = self._metrics_lines()
        kept = [line for line, record in lines if record.get("step", step) <= step]
        if len(kept) < len(lines):
            write_text(self.metrics_file, "".join(kept))
        return len(lines) - len(kept)

    def _metrics_lines(self) -> list[tuple[str, dict]]:
        if not self.metrics_file.exists():
            return []
        # Split at \n only: str.splitlines also takes U+2028 and others, which JSON strings may hold.
        *lines, rest = self.metrics_file.read_bytes().split(b"\n")
        if rest:
            logger.warning("%s: left out its half last line (%d bytes)", self.metrics_file, len(rest))
        records = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"{type(record).__name__} instead of an object")
            except ValueError as error:
                place = f"{self.metrics_file}, line {number}"
                raise ValueError(f"{place}: not a JSON object ({error}): delete the line") from None
            records.append((line.decode() + "\n", _with_floats(record)))
        return records


def check_disk_space(folder: str | Path, needed: int, what: str):
    """Refuse to start writing what would not fit.

    Args:
        folder: where it will be written; need not exist yet.
        needed: bytes.
        what: what will be written, for the message.

    Raises:
        NotEnoughDiskSpace: with what is free and what is needed.
    """
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise NotEnoughDiskSpace(
            f"{folder}: {format_bytes(free)} are free, but {format_bytes(needed)} are needed for {what}: "
            f"make room for {format_bytes(needed - free)} more there, or choose a folder on another disk"
        )


def describe_environment(device: str | None = None) -> dict:
    """What a run ran on, for `run.json`; imports none of the packages.

    Args:
        device: its name, which only torch knows.

    Returns:
        `versions` (package -> version, None where it is not installed), `commit` of the repository around the working
        directory (with `-dirty` for uncommitted changes; None where there is none), `host`, `platform`, `device`.
    """
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    return {
        "versions": versions,
        "commit": _commit(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "device": device,
    }


def compare_runs(stored: dict, now: dict, ignore: Collection[str] = ()) -> list[str]:
    """In what two runs' identities differ; a resume is refused where this is not empty.

    Args:
        stored: from `run.json`.
        now: of the run about to start.
        ignore: key paths (`recipe.output`), each with all below it.

    Returns:
        Lines `key.path: stored -> now`, values as JSON, in the order of the keys.
    """
    # Both as JSON gives them back, so that a tuple is no difference from the list it was stored as.
    return list(_differences(json.loads(_json(stored)), json.loads(_json(now)), "", frozenset(ignore)))


_ABSENT = object()


def _differences(stored, now, path: str, ignore: Collection[str]) -> Iterator[str]:
    if path in ignore:
        return
    sides = [side for side in (stored, now) if side is not _ABSENT]
    if all(isinstance(side, dict) for side in sides) and (len(sides) == 2 or sides[0]):
        stored, now = ({} if side is _ABSENT else side for side in (stored, now))
        for key in stored | now:
            below = f"{path}.{key}" if path else key
            yield from _differences(stored.get(key, _ABSENT), now.get(key, _ABSENT), below, ignore)
    elif all(isinstance(side, list) for side in (stored, now)) and len(stored) == len(now):
        for index, (left, right) in enumerate(zip(stored, now, strict=True)):
            yield from _differences(left, right, f"{path}[{index}]", ignore)
    elif stored != now:
        shown = ["(absent)" if side is _ABSENT else json.dumps(side, ensure_ascii=False) for side in (stored, now)]
        yield f"{path}: {shown[0]} -> {shown[1]}"


def _json(value, indent: int | None = None) -> str:
    return json.dumps(_with_names(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _with_names(value):
    """Non-finite floats -> their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _with_names(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_with_names(below) for below in value]
    return value


def _with_floats(value):
    """The names of non-finite floats -> the floats."""
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _with_floats(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_with_floats(below) for below in value]
    return value


def _cut_half_line(file: IO[bytes]):
    """What a killed process began to write must not become the beginning of the next record."""
    size = file.seek(0, os.SEEK_END)
    end = size
    while end:
        begin = max(0, end - 4096)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        end = begin + newline + 1 if newline >= 0 else begin
        if newline >= 0:
            break
    if end < size:
        logger.warning("%s: removed its half last line (%d bytes)", file.name, size - end)
        file.truncate(end)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no repository, somebody else's, or no commit in it yet
        return None
    return done.stdout.strip() or None


def _this_process() -> dict:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(shlex.join(sys.orig_argv).split()),  # one line
    }


def _read_holder(file: Path) -> dict:
    """Who says to hold the lock. Just after it was taken that can be nobody, or the holder before, who was killed."""
    deadline = time.monotonic() + HOLDER_WAIT
    while True:
        try:
            holder = json.loads(file.read_bytes())
        except (OSError, ValueError):
            holder = {}
        if holder and (holder["host"] != socket.gethostname() or _is_alive(holder["pid"])):
            return holder
        if time.monotonic() > deadline:
            return holder
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # there os.kill(pid, 0) would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# The lock belongs to the open file, and a forked child (a loader worker) has it open too: were it not closed there, a
# killed run would stay locked for as long as one of its workers lives.
_locked_files: set[IO[bytes]] = set()


def _close_in_child():
    for file in _locked_files:
        file.close()
    _locked_files.clear()


if os.name == "nt":
    import msvcrt

    def _try_lock(file: IO[bytes]) -> bool:
        file.seek(1 << 30)  # a byte far behind the text, which others may then still read
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    os.register_at_fork(after_in_child=_close_in_child)

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
