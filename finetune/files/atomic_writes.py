"""Files and folders that are there whole or not at all, whatever kills the process or fills the disk.

What is being written has a hidden name beside the final one, is fsynced (fsync), and only then gets its
final name. A process that dies leaves at most these names behind; `clean_partials` deals with them:

    .NAME.partial-1a2b3c4d     being written, worth nothing
    .NAME.replaced-1a2b3c4d    the whole old folder, in the instant between its moving away and the new one's moving in
    .NAME.removed-1a2b3c4d     being deleted, worth nothing
"""

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import Failed, InputError
from finetune.files.path_errors import write_error, write_errors

if sys.platform != "win32":  # there, what a killed process left of a large folder stays
    import fcntl

logger = logging.getLogger(__name__)

HIDDEN_NAME = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced|removed)-[0-9a-f]{8}")


def write_text(path: str | Path, text: str) -> None:
    """Give a file this text (UTF-8): readers see the old text or the new one, never a part.

    Raises:
        PathError: nothing can be written under this path.
        DiskError: the disk is full or fails; the old file is as it was.
    """
    path = Path(path)
    partial = _hidden(path, "partial")
    try:
        with write_errors(path):
            with partial.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def writing_file(final: str | Path) -> Iterator[Path]:
    """The name of a file to write, which becomes `final` when the block ends without an exception.

    Raises:
        PathError: nothing can be written under this path.
        DiskError: the disk is full or fails; under the final name is what was there before.
    """
    final = Path(final)
    partial = _hidden(final, "partial")
    try:
        with _errors_in_block(partial, final):
            yield partial
        with write_errors(final):
            _sync(partial, os.O_RDWR)
            partial.replace(final)
            sync_folder(final.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def writing_folder(final: str | Path) -> Iterator[Path]:
    """A fresh folder to fill, which becomes `final` when the block ends without an exception.

    A `final` that exists is replaced. Folders cannot be exchanged in one step everywhere, so it is moved aside for the
    instant before the new one moves in; if the process dies just then, `clean_partials` moves it back.

    Raises:
        PathError: nothing can be written under this path.
        DiskError: the disk is full or fails. Under the final name is what was there before. Only when the very last
            step fails, the folder's fsync, it is the new folder, whole, but a power failure could still lose it.
    """
    final = Path(final)
    make_folder(final.parent)
    partial = _hidden(final, "partial")
    try:
        with write_errors(final, "write the folder"):
            partial.mkdir()
        with _errors_in_block(partial, final):
            yield partial
        with write_errors(final, "write the folder"):
            _sync_tree(partial)
            replaced = _move_in(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if replaced is not None:
        try:
            remove(replaced)
        except OSError as error:  # the new one is in place all the same
            logger.warning("%s could not be deleted (%s): delete it to free its space", replaced, error)


@contextmanager
def writing_large_folder(final: str | Path) -> Iterator[Path]:
    """As `writing_folder`, after removing what killed processes left of the same folder: it may be gigabytes.

    A partial is locked for as long as its writer lives, so that of others at work it is left alone.
    """
    final = Path(final)
    with write_errors(final, "write the folder"):
        _remove_abandoned(final)
    with writing_folder(final) as partial, _held(partial):
        yield partial


def remove(path: str | Path) -> None:
    """Delete a file or folder; nobody sees it half deleted under its name.

    Raises:
        PathError, DiskError: it cannot be moved aside. Where only the deletion fails it is logged: nothing depends on
            it.
    """
    path = Path(path)
    hidden = HIDDEN_NAME.fullmatch(path.name)
    doomed = _hidden(path.with_name(hidden["name"]) if hidden else path, "removed")
    with write_errors(path, "remove"):
        path.rename(doomed)
        sync_folder(path.parent)
    try:
        _delete(doomed)
    except OSError as error:
        logger.warning("%s could not be deleted (%s): delete it to free its space", doomed, error)


def clean_partials(folder: str | Path) -> None:
    """Remove what killed processes left in a folder, and move back what they had moved aside.

    Only for the one writer of the folder (the holder of the run's lock): the partial of a living process looks the
    same.

    Raises:
        PathError, DiskError: the folder cannot be read or changed.
    """
    folder = Path(folder)
    with write_errors(folder, "remove unfinished files from"):
        if not folder.is_dir():
            return
        for final, aside in moved_aside(folder):
            aside.rename(final)
            sync_folder(folder)
            logger.info("%s: moved back; a process was killed while replacing it", final)
        for path in sorted(folder.iterdir()):
            hidden = HIDDEN_NAME.fullmatch(path.name)
            if hidden is None:
                continue
            if hidden["kind"] == "replaced":
                remove(path)  # by way of "removed": a "replaced" that is there is always whole
            else:
                _delete(path)
            logger.info("%s: removed; a process was killed while writing or deleting it", path)


def moved_aside(folder: Path) -> Iterator[tuple[Path, Path]]:
    """The (final name, present name) of those whose replacement was cut short: nothing has their final name."""
    for path in sorted(folder.iterdir()):
        hidden = HIDDEN_NAME.fullmatch(path.name)
        if hidden and hidden["kind"] == "replaced" and not os.path.lexists(folder / hidden["name"]):
            yield folder / hidden["name"], path


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, and bring their names to the disk.

    Raises:
        PathError, DiskError: it cannot be created.
    """
    with write_errors(folder, "create the folder"):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in reversed(missing):
            sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: a rename survives a power failure only after this."""
    if os.name == "nt":  # folders cannot be opened there
        return
    try:
        _sync(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no fsync of folders
            raise


@contextmanager
def _errors_in_block(partial: Path, final: Path) -> Iterator[None]:
    """Say of an OSError about what is being written that it is about `final`; the block may also read other files."""
    try:
        yield
    except OSError as error:
        if isinstance(error, InputError | Failed):
            raise
        named = error.filename
        of_ours = isinstance(named, str | Path) and Path(named).is_relative_to(partial)
        if of_ours or error.errno in (errno.ENOSPC, errno.EDQUOT):  # writing into an open file names none
            raise write_error(final, error) from error
        raise


def _remove_abandoned(final: Path) -> None:
    if sys.platform == "win32" or not final.parent.is_dir():
        return
    for path in sorted(final.parent.iterdir()):
        hidden = HIDDEN_NAME.fullmatch(path.name)
        if hidden and hidden["name"] == final.name and hidden["kind"] == "partial" and path.is_dir():
            with _held(path) as ours:
                if ours:
                    remove(path)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock, which the operating system ends with the process; whether it could be had."""
    if sys.platform == "win32":
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = True
        except OSError:  # another process has it, or this file system has no locks
            ours = False
        yield ours
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            _sync(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    sync_folder(folder)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_in(partial: Path, final: Path) -> Path | None:
    """Give `partial` its final name; returns where the old one is now."""
    replaced = _hidden(final, "replaced") if os.path.lexists(final) else None
    try:
        if replaced is not None:
            final.rename(replaced)
        partial.rename(final)
    except BaseException:
        if replaced is not None and not os.path.lexists(final):
            replaced.rename(final)
        raise
    sync_folder(final.parent)
    return replaced


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{secrets.token_hex(4)}")
