"""Errors of Transformers' loaders about a folder or hub id that the user named, as input errors."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from qwenvl.errors import InputError, MissingFileError


@contextmanager
def pretrained_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a `from_pretrained` raises about files that are missing or damaged into an `InputError`.

    Args:
        path: folder or hub id, as the user wrote it.

    Raises:
        MissingFileError: there is no such folder or hub id, or a file of it is missing.
        InputError: a file of it is not JSON, or cannot be read.
    """
    try:
        yield
    except InputError as error:
        if os.fspath(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: one of its configuration files is damaged ({error}): restore it") from error
    except OSError as error:
        if isinstance(error.__context__, json.JSONDecodeError | UnicodeDecodeError):
            raise InputError(f"{path}: {' '.join(str(error).split())} Restore it") from error
        if error.strerror is not None:  # the operating system's error, not one that Transformers worded
            name = error.filename or path
            raise InputError(f"{name} cannot be read ({error.strerror}): check it and its permissions") from error
        raise MissingFileError(f"{path} cannot be loaded: {' '.join(str(error).split())}") from error
