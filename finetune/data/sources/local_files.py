"""What goes wrong with a user's data files on this machine, as errors that name the file, the reason and a remedy."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from finetune.data.sample import DataError
from finetune.files.path_errors import PathError, path_errors


@contextmanager
def data_errors(path: Path) -> Iterator[None]:
    """Turn an OSError about a data file or folder into a `DataError`.

    Raises:
        DataError: it does not exist any more, you have no permission, the path is too long, ...
    """
    try:
        with path_errors(path, "read", "Check the path and its permissions, or give another one"):
            yield
    except PathError as error:
        raise DataError(str(error)) from error


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """A data file, opened to be read.

    Raises:
        DataError: it cannot be read.
    """
    with data_errors(path), path.open("rb") as file:
        yield file
