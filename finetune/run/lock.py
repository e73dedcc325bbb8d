"""The lock that keeps a second run out of a folder."""

import contextlib
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from finetune.errors import UserError
from finetune.files.atomic_writes import make_folder
from finetune.files.path_errors import write_errors

LOCK_FILE = "run.lock"
HOLDER_WAIT = 5.0  # seconds that a second process waits for the first to have written who it is


class RunLocked(UserError):
    """Another process has the run folder.

    Attributes:
        holder: its `pid`, `host`, `since` (ISO 8601) and `command`; empty where it has not written them.
    """

    def __init__(self, folder: Path, holder: dict[str, Any]):
        who = "another process"
        if holder:
            who = "process {pid} on {host} since {since} ({command})".format_map(holder)
        super().__init__(f"{folder} is in use by {who}: wait until it is done, stop it, or choose another output")
        self.holder = holder


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder; it is created if it does not exist.

    The operating system releases the lock with the process, however that ends: there is no stale lock, the file stays
    and its existence does not mean that the folder is locked. In a distributed run (`RANK` set by the launcher) the
    main process holds it for all; in the others this does nothing.

    Raises:
        RunLocked: another process holds it; says which.
        PathError: nothing can be written there, or the file system has no locks.
        DiskError: the disk is full or fails.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    make_folder(folder)
    file_path = folder / LOCK_FILE
    with write_errors(folder, "write to the folder"):
        file = file_path.open("ab+", buffering=0)
    with file:
        _locked_files.add(file)
        try:
            with write_errors(folder, "lock the folder"):
                if not _try_lock(file):
                    raise RunLocked(folder, _read_holder(file_path))
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


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(shlex.join(sys.orig_argv).split()),  # one line
    }


def _read_holder(file: Path) -> dict[str, Any]:
    """The process named in the lock file. Just after a lock was taken that can be none, or the previous holder, which
    was killed."""
    deadline = time.monotonic() + HOLDER_WAIT
    while True:
        try:
            holder = json.loads(file.read_bytes())
        except (OSError, ValueError):
            holder = {}
        if not isinstance(holder, dict) or not holder.keys() >= _this_process().keys():
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


def _close_in_child() -> None:
    for file in _locked_files:
        file.close()
    _locked_files.clear()


if sys.platform == "win32":
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
