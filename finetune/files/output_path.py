"""Whether anything can be written under a path that a user named, found out before the work is done."""

import errno
import os
import tempfile
from pathlib import Path

from finetune.files.path_errors import path_errors


def check_output_folder(folder: str | Path, option: str) -> None:
    """Refuse a folder that could not be created or written into. Nothing that is created here stays.

    Args:
        folder: as the user gave it.
        option: where the user gave it, for the message: "--to".

    Raises:
        PathError: a file is in the way, the disk is read-only, permission is missing, ...
    """
    folder = Path(folder)
    with path_errors(folder, f"write {option}"):
        existing = _existing(folder)
        if existing == folder and not folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        _write_nothing(existing)


def check_output_file(file: str | Path, option: str) -> None:
    """Refuse a file that could not be created or replaced. Nothing that is created here stays.

    Args:
        file: as the user gave it.
        option: where the user gave it, for the message: "--html".

    Raises:
        PathError: it is a folder, the disk is read-only, permission is missing, ...
    """
    file = Path(file)
    with path_errors(file, f"write {option}"):
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _existing(file)
        _write_nothing(_existing(file.absolute().parent))


def _existing(path: Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    try:
        path.lstat()
    except FileNotFoundError:
        return next(part for part in path.absolute().parents if os.path.lexists(part))
    return path


def _write_nothing(folder: Path) -> None:
    # The one certain way to know: permissions, access lists, read-only mounts and network shares all have a say. On
    # Linux the file never has a name.
    tempfile.TemporaryFile(dir=folder).close()
