"""Whether a disk has room for what is about to be written."""

import errno
import shutil
from pathlib import Path

from finetune.errors import UserError
from finetune.files.path_errors import write_errors
from finetune.quantities import format_bytes


class NotEnoughDiskSpace(UserError, OSError):
    """Free space would not hold what is about to be written."""

    def __init__(self, message: str):
        super().__init__(message)
        self.errno = errno.ENOSPC


def check_disk_space(folder: str | Path, needed: int, what: str) -> None:
    """Refuse to start writing what would not fit.

    Args:
        folder: where it will be written; need not exist yet.
        needed: bytes.
        what: what will be written, for the message.

    Raises:
        NotEnoughDiskSpace: with what is free and what is needed.
        PathError: nothing can be written there at all.
    """
    folder = Path(folder).absolute()
    with write_errors(folder, "write to the folder"):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
    if free < needed:
        raise NotEnoughDiskSpace(
            f"{folder}: {format_bytes(free)} are free, but {format_bytes(needed)} are needed for {what}: "
            f"make room for {format_bytes(needed - free)} more there, or choose a folder on another disk"
        )
