"""Whether a path that the user named can be written, found out before the work begins.

A merge or an export of a large model takes minutes. The attempt here is the one that the work would make at its end
(see `atomic_writes`): the same folders, and the same hidden name beside the final one. Nothing of it stays.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import UserError
from finetune.files.path_errors import path_errors


def refuse_unwritable_folder(folder: Path, what: str, option: str, *, replaced: bool = True) -> None:
    """Raises:
    UserError: `folder` cannot be made, or a file is in its place. One that exists is fine.

    Args:
        folder: as the user wrote it.
        what: will be written, for the message: "the merged model".
        option: by which the user named it: "--to".
        replaced: a folder that exists is replaced by a new one; otherwise files are written into it.
    """
    if replaced and folder.name in ("", ".."):
        raise UserError(f"{option} {folder}: give the folder by its name")
    with path_errors(folder, f"write {what} to", f"Give another folder with {option}"):
        if os.path.lexists(folder) and not folder.is_dir():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        inside = not replaced and folder.is_dir()
        with _parents_made(folder / "a" if inside else folder) as hidden:
            hidden.mkdir()
            hidden.rmdir()


def refuse_unwritable_file(file: Path, what: str, option: str) -> None:
    """Raises:
    UserError: `file` cannot be written. One that exists is fine: it will be replaced.

    Args:
        file: as the user wrote it.
        what: will be written, for the message: "the page".
        option: by which the user named it: "--html".
    """
    with path_errors(file, f"write {what} to", f"Give another file with {option}"):
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if file.is_symlink() and not file.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        with _parents_made(file) as hidden:
            hidden.touch(exist_ok=False)
            hidden.unlink()


@contextmanager
def _parents_made(final: Path) -> Iterator[Path]:
    """A hidden name beside `final`, as long as those of `atomic_writes`; folders that were made for it are removed."""
    final = final.absolute()
    missing = [folder for folder in final.parents if not folder.exists()]
    try:
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # the message is about `final`
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        yield final.with_name(f".{final.name}.partial-{secrets.token_hex(4)}")
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # not made, or another process has put something there
                folder.rmdir()
