"""Files of a checkpoint or adapter folder: regular files of its own, neither links to other places nor LFS pointers.

A folder that was downloaded or unpacked can hold links. Followed, `LICENSE -> ~/.ssh/id_rsa` would be copied into an
exported folder, and a settings file could be any file of the machine. So links are followed within the folder only; in
the hub cache, whose snapshots are folders of links, within the cache of the same repository.

Weights are the exception: users keep them on another disk and link to them, and nothing but tensors with the names and
shapes of the model is ever taken out of such a file. A link to weights may lead to any regular file.
"""

import os
import stat
from pathlib import Path

from qwenvl.errors import InputError, MissingFileError

LFS_START = b"version https://git-lfs"
LFS_REMEDY = "is a Git LFS pointer, not the file: run `git lfs pull` in its folder, or download the file"


def own_root(folder: Path) -> Path:
    """The folder that links may not leave: itself, or for a snapshot of the hub cache that of its repository."""
    root = folder.resolve()
    for parent in root.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent
    return root


def is_own_file(file: Path, folder: Path) -> bool:
    """Whether a file of a folder is a regular file, and where it is a link, one within the folder (see `own_root`)."""
    try:
        return stat.S_ISREG(file.stat().st_mode) and file.resolve().is_relative_to(own_root(folder))
    except (OSError, RuntimeError):  # a link to nowhere, or one that leads to itself
        return False


def refuse_foreign_file(file: Path, folder: Path) -> None:
    """Check a settings or text file of a folder before it is read.

    Raises:
        InputError: it is a link out of the folder, or neither a file nor a link to one.
        MissingFileError: a link to nowhere.
    """
    refuse_irregular_file(file)
    if not is_own_file(file, folder):
        raise InputError(
            f"{file} is a link to {os.path.realpath(file)}, outside of its folder: put a copy of the file there"
        )


def refuse_irregular_file(file: Path) -> None:
    """Check that a path is a regular file, or a link to one: opening a pipe would wait for its other end.

    Raises:
        InputError: it is a folder, a pipe, a device or a link to itself.
        MissingFileError: there is no such file, or it is a link to nowhere.
    """
    try:
        kind = file.stat().st_mode
    except FileNotFoundError as error:
        what = "is a link to a file that is not there" if file.is_symlink() else "does not exist"
        raise MissingFileError(f"{file} {what}: fetch it again") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): check it and its permissions") from error
    if stat.S_ISDIR(kind):
        raise InputError(f"{file} is a folder where a file is expected: restore the file")
    if not stat.S_ISREG(kind):
        raise InputError(f"{file} is a pipe or a device, not a file: restore the file")


def refuse_lfs_pointer(file: Path) -> None:
    """Check that a file is what its name says, not the pointer that a clone without Git LFS leaves in its place.

    Raises:
        InputError: it is a pointer, or cannot be read.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(len(LFS_START))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): check its permissions") from error
    if start == LFS_START:
        raise InputError(f"{file} {LFS_REMEDY}")
