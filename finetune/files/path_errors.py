"""What the operating system says about a path that a user named, as a sentence with a remedy."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import Failed, InputError, UserError

_ANOTHER_PATH = "Give another path"
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class PathError(UserError, OSError):
    """A path that the user named cannot be read or written. `errno` is the operating system's.

    Args:
        path: as the user wrote it.
        doing: what was being done, before the path: "write the report to".
        cause: what the operating system said.
        remedy: what the user can do, as a sentence without its full stop; None for what follows from the reason.
        about: what `cause` is about, where that is a path above or below `path`.
    """

    def __init__(
        self, path: str | Path, doing: str, cause: OSError, remedy: str | None = None, about: str | Path | None = None
    ):
        self.about = Path(path if about is None else about)
        self.has_own_remedy = remedy is not None
        reason, from_reason = _reason(self.about, cause, "it" if self.about == Path(path) else str(self.about))
        super().__init__(f"cannot {doing} {path}: {reason}. {remedy or from_reason}")
        self.cause = cause
        self.errno = cause.errno
        self._arguments = (path, doing, cause, remedy, about)

    def __reduce__(self) -> tuple[type["PathError"], tuple[str | Path, str, OSError, str | None, str | Path | None]]:
        return type(self), self._arguments


class DiskError(Failed, OSError):
    """The disk is full or fails during the work; the input was right. `errno` is the operating system's.

    Args:
        path: what was being written.
        cause: what the operating system said.
    """

    def __init__(self, path: Path, cause: OSError):
        super().__init__(str(OSError(cause.errno, cause.strerror, str(path))))
        self.about = path
        self.cause = cause
        self.errno = cause.errno

    def __reduce__(self) -> tuple[type["DiskError"], tuple[Path, OSError]]:
        return type(self), (self.about, self.cause)


@contextlib.contextmanager
def path_errors(path: str | Path, doing: str, remedy: str) -> Iterator[None]:
    """Turn an OSError about a path that the user named into a `PathError`.

        with path_errors(to, "write the merged model to", "Give another --to"):
            ...

    Args:
        path: as the user wrote it.
        doing: what was being done, before the path: "write the report to".
        remedy: what the user can do, as a sentence without its full stop.

    Raises:
        PathError: in place of any OSError that is not an error for the user already. Also in place of those that
            `write_errors` raises for this path, or for one above or below it, as their remedies are more general.
    """
    try:
        yield
    except (PathError, DiskError) as error:
        if (isinstance(error, PathError) and error.has_own_remedy) or not _related(error.about, Path(path)):
            raise
        raise PathError(path, doing, error.cause, remedy, about=error.about) from error.cause
    except OSError as error:
        if isinstance(error, InputError | Failed):
            raise
        raise PathError(path, doing, error, remedy) from error


@contextlib.contextmanager
def write_errors(path: str | Path, doing: str = "write") -> Iterator[None]:
    """Turn an OSError about a path that is written into an error for the user, where its option is not known.

    Raises:
        PathError: another path would do.
        DiskError: the disk is full or fails.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, InputError | Failed):
            raise
        raise write_error(path, error, doing) from error


def write_error(path: str | Path, cause: OSError, doing: str = "write") -> PathError | DiskError:
    """The error that `write_errors` raises."""
    return DiskError(Path(path), cause) if cause.errno in _DISK_FAULTS else PathError(path, doing, cause)


def _related(one: Path, other: Path) -> bool:
    one, other = one.absolute(), other.absolute()
    return one.is_relative_to(other) or other.is_relative_to(one)


def _reason(path: Path, cause: OSError, name: str) -> tuple[str, str]:
    """Why the operating system refuses a path, and what the user can do about it in general.

    Args:
        name: of the path in the sentence.
    """
    nearest = next((part for part in (path, *path.parents) if os.path.lexists(part)), path)
    match cause.errno:
        case errno.ENOENT | errno.EEXIST | errno.ENOTDIR:
            with contextlib.suppress(OSError):  # of looking at what is there
                return _obstacle(path, name, cause)
            return cause.strerror or str(cause), _ANOTHER_PATH
        case errno.EISDIR:
            return f"{name} is a folder", _ANOTHER_PATH
        case errno.EACCES | errno.EPERM:
            place = f" for {name}" if name != "it" else "" if nearest == path else f" in {nearest}"
            return f"you have no permission{place}", "Give a path that you may write to, or ask for it"
        case errno.EROFS:
            return f"{name if nearest == path else nearest} is on a read-only disk", "Give a path on another disk"
        case errno.ENAMETOOLONG:
            return "the name is too long", "Give a shorter one"
        case errno.ELOOP:
            return "its symbolic links form a loop", _ANOTHER_PATH
        case errno.ENOSPC:
            return "the disk is full", "Make room there, or give a path on another disk"
        case errno.EDQUOT:
            return "your quota on the disk is used up", "Make room there, or give a path on another disk"
        case errno.ENOLCK | errno.ENOTSUP:
            return f"its file system cannot do this ({cause.strerror})", "Give a path on another disk"
        case _:
            return cause.strerror or str(cause), _ANOTHER_PATH


def _obstacle(path: Path, name: str, cause: OSError) -> tuple[str, str]:
    """The first part of a path that is no folder, and the remedy."""
    for part in (*reversed(path.parents), path):
        part_name = name if part == path else str(part)
        if part.is_symlink() and not part.exists():
            reason = f"{part_name} is a symbolic link to {part.readlink()}, which does not exist"
            return reason, "Remove the link, or give another path"
        if not part.exists():
            return (f"{name} does not exist" if part == path else f"there is no folder {part}"), _ANOTHER_PATH
        if not part.is_dir():
            in_the_way = cause.errno == errno.EEXIST and part_name == "it"
            reason = "a file of this name is in the way" if in_the_way else f"{part_name} is a file"
            return reason, f"{_ANOTHER_PATH}, or move that file away"
    return f"{name} exists already", f"{_ANOTHER_PATH}, or remove what is there"
