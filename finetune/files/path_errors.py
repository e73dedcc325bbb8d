"""What the operating system says about a path that a user named, as a sentence with a remedy."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import InputError, UserError

REASONS = {
    errno.ENOENT: "it does not exist",
    errno.EEXIST: "a file of this name is in the way",
    errno.ENOTDIR: "a file is in the way of one of its folders",
    errno.EISDIR: "it is a folder",
    errno.EACCES: "you have no permission",
    errno.EPERM: "you have no permission",
    errno.EROFS: "the disk is read-only",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your quota on the disk is used up",
}


class PathError(UserError, OSError):
    """A path that the user named cannot be read or written. `errno` is the operating system's."""

    def __init__(self, path: str | Path, doing: str, cause: OSError, remedy: str):
        reason = REASONS.get(cause.errno or 0, cause.strerror or str(cause))
        if cause.errno in (errno.EEXIST, errno.ENOENT) and Path(path).is_symlink() and not Path(path).exists():
            reason = f"it is a symbolic link to {Path(path).readlink()}, which does not exist"
        super().__init__(f"cannot {doing} {path}: {reason}. {remedy}")
        self.errno = cause.errno


@contextmanager
def path_errors(path: str | Path, doing: str, remedy: str) -> Iterator[None]:
    """Turn an OSError about a path that the user named into a `PathError`.

        with path_errors(to, "write the merged model to", "Give another --to"):
            ...

    Args:
        path: as the user wrote it.
        doing: what was being done, before the path: "write the report to".
        remedy: what the user can do, as a sentence.

    Raises:
        PathError: in place of any OSError that is not one of ours already.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, InputError):
            raise
        raise PathError(path, doing, error, remedy) from error
