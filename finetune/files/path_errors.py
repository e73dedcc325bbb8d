"""What the operating system says about a path that a user named, as a sentence with a remedy."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import Failed, UserError

DISK_FULL = {
    errno.ENOSPC: "the disk is full (No space left on device)",
    errno.EDQUOT: "your quota on the disk is used up (Disk quota exceeded)",
}
_ANOTHER_PATH = "Give another path"


class PathError(UserError, OSError):
    """A path that the user named cannot be read or written. `errno` is the operating system's.

    Attributes:
        general: `cause` and `path` of an error whose remedy was not chosen by the caller, who knows the option's name.
    """

    def __init__(self, message: str, number: int | None = None, general: tuple[OSError, Path] | None = None):
        super().__init__(message)
        self.errno = number
        self.general = general

    def __reduce__(self) -> tuple[type["PathError"], tuple[str, int | None]]:
        return type(self), (str(self), self.errno)


class DiskError(Failed, OSError):
    """The disk under a path is full or fails, though the path is right. `errno` is the operating system's."""

    def __init__(self, message: str, number: int | None = None):
        super().__init__(message)
        self.errno = number

    def __reduce__(self) -> tuple[type["DiskError"], tuple[str, int | None]]:
        return type(self), (str(self), self.errno)


@contextlib.contextmanager
def path_errors(path: str | Path, doing: str, remedy: str | None = None) -> Iterator[None]:
    """Turn an OSError about a path that the user named into a `PathError` or a `DiskError`.

        with path_errors(to, "write the merged model to", "Give another --to"):
            ...

    Args:
        path: as the user wrote it.
        doing: what was being done, before the path: "write the report to".
        remedy: what the user can do, as a sentence without its full stop; by default what follows from the reason.

    Raises:
        PathError, DiskError: in place of any OSError that is not one of these, or another error for the user, already.
    """
    path = Path(path)
    try:
        yield
    except PathError as error:
        if error.general is None or remedy is None:
            raise
        # The caller's own words are better for its path and for the folders that this path needs.
        cause, about = error.general
        if about.absolute() not in (path.absolute(), *path.absolute().parents):
            raise
        raise path_error(path, doing, cause, remedy) from cause
    except OSError as error:
        if isinstance(error, UserError | Failed):
            raise
        raise path_error(path, doing, error, remedy) from error


def path_error(path: str | Path, doing: str, cause: OSError, remedy: str | None = None) -> PathError | DiskError:
    """The error that `path_errors` raises for `cause`; see there for the arguments."""
    path = Path(path)
    if cause.errno in DISK_FULL:
        full = f"cannot {doing} {path}: {DISK_FULL[cause.errno]}. Make room there, or use another disk"
        return DiskError(full, cause.errno)
    if cause.errno == errno.EIO:
        failing = f"cannot {doing} {path}: the disk fails ({cause.strerror}). Check it, or use another disk"
        return DiskError(failing, cause.errno)
    reason, from_reason = _reason(path, cause)
    general = (cause, path) if remedy is None else None
    return PathError(f"cannot {doing} {path}: {reason}. {remedy or from_reason}", cause.errno, general)


def _reason(path: Path, cause: OSError) -> tuple[str, str]:
    """Why the operating system refuses a path, and what the user can do about it in general."""
    nearest = next((part for part in (path, *path.parents) if os.path.lexists(part)), path)
    inside = "" if nearest == path else f" in {nearest}"
    match cause.errno:
        case errno.ENOENT | errno.EEXIST | errno.ENOTDIR:
            with contextlib.suppress(OSError):  # of looking at what is there
                return _obstacle(path)
            return cause.strerror or str(cause), _ANOTHER_PATH
        case errno.EISDIR:
            return "it is a folder", _ANOTHER_PATH
        case errno.EACCES | errno.EPERM:
            return f"you have no permission{inside}", "Give a path where you have it, or ask for it"
        case errno.EROFS:
            return f"{'it' if nearest == path else nearest} is on a read-only disk", "Give a path on another disk"
        case errno.ENAMETOOLONG:
            return "the name is too long", "Give a shorter one"
        case errno.ELOOP:
            return "its symbolic links lead in a circle", _ANOTHER_PATH
        case errno.ENOLCK | errno.ENOTSUP:
            return f"its file system cannot do this ({cause.strerror})", "Give a path on another disk"
        case _:
            return cause.strerror or str(cause), _ANOTHER_PATH


def _obstacle(path: Path) -> tuple[str, str]:
    """The first part of a path that is no folder, and the remedy."""
    for part in (*reversed(path.parents), path):
        name = "it" if part == path else str(part)
        if part.is_symlink() and not part.exists():
            reason = f"{name} is a symbolic link to {part.readlink()}, which does not exist"
            return reason, "Remove the link, or give another path"
        if not part.exists():
            return ("it does not exist" if part == path else f"there is no folder {part}"), _ANOTHER_PATH
        if not part.is_dir():
            return f"{name} is a file", f"{_ANOTHER_PATH}, or move that file away"
    return "it exists already", f"{_ANOTHER_PATH}, or remove what is there"
