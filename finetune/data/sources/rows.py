"""Rows of a JSON or JSON Lines file, by number.

A file may have millions of rows: only the position of each in the file is kept, 16 bytes, and the row is read on
access.
"""

import codecs
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from finetune.data.sample import BadRow, Origin
from finetune.data.sources.json_faults import ROW_DECODER, KeyTwice, named_fault
from finetune.data.sources.json_list import find_elements, kind_of, why_unreadable
from finetune.data.sources.local_files import open_data
from finetune.data.sources.text_encoding import not_utf8


class Rows(ABC):
    """Raw rows by number, from 0, as mappings of columns to values; images are not decoded.

    Attributes:
        name: the source, as the recipe names it.
        folder: where relative image paths start and what they must stay in, unless the recipe says another folder.
        notes: what a reader of the data should know of the source as a whole, such as what was left out of it.
    """

    name: str
    folder: Path
    notes: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Row `index`.

        Raises:
            BadRow: it cannot be read.
            DataError: its file cannot be read.
        """

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self[index] for index in range(len(self)))

    def origin(self, index: int) -> Origin:
        """Where row `index` came from."""
        return Origin(self.name, index + 1)

    def scan(self, start: int, stop: int) -> Iterator[Mapping[str, Any] | BadRow]:
        """Rows `start` to `stop` in order, for their text: placeholders may replace the bytes of images.

        A row that cannot be read comes as its error, so that the rows after it are read too.
        """
        for index in range(start, stop):
            try:
                yield self[index]
            except BadRow as error:
                yield error

    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digest that changes when the rows do."""


class TextRows(Rows):
    """Rows of a text file, each read from its position on access.

    A subclass sets `_path`, `_starts` (the positions) and `_digest`, and reads a row at its position.
    """

    _path: Path
    _starts: "array[int]"
    _digest: str

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        # Opened for each row: loader workers that share an open file would move each other's position in it.
        with open_data(self._path) as file:
            return self._read(file, index)

    def scan(self, start: int, stop: int) -> Iterator[Mapping[str, Any] | BadRow]:
        with open_data(self._path) as file:
            for index in range(start, stop):
                try:
                    yield self._read(file, index)
                except BadRow as error:
                    yield error

    def fingerprint(self) -> str:
        return self._digest

    @abstractmethod
    def _read(self, file: BinaryIO, index: int) -> Mapping[str, Any]:
        """Row `index` of the open file."""


class JsonRows(TextRows):
    """The rows of a JSON file that holds a list.

    The constructor reads the file once, for the positions of the rows and a digest.

    Args:
        path, name: of the file.
        text: a file with its text as UTF-8; None where it is that itself.

    Raises:
        DataError: not JSON, or not a list.
    """

    def __init__(self, path: Path, name: str, text: Path | None = None):
        self.name, self.folder = name, path.parent.absolute()
        self._path = (text or path).absolute()
        self._starts, self._ends, self._digest = find_elements(self._path, name)

    def _read(self, file: BinaryIO, index: int) -> Mapping[str, Any]:
        file.seek(self._starts[index])
        return row_from_json(file.read(self._ends[index] - self._starts[index]), self.origin(index), "row")


class JsonLinesRows(TextRows):
    """The rows of a JSON Lines file (UTF-8; a byte order mark, CRLF and empty lines are fine).

    The constructor reads the file once, for the positions of the lines and a digest. A line that is not JSON is an
    error of its own row only, and so is one that is not UTF-8 among others that are.

    Args:
        path, name, text: see `JsonRows`.

    Raises:
        DataError: no line with characters beyond ASCII is UTF-8.
    """

    def __init__(self, path: Path, name: str, text: Path | None = None):
        self.name, self.folder = name, path.parent.absolute()
        self._path = (text or path).absolute()
        self._starts = array("q")  # bytes from the file's beginning
        self._lines = array("q")  # line numbers, from 1
        digest = sha256()
        offset = 0
        wrong: int | None = None  # the first byte that is not UTF-8
        is_utf8 = False  # whether a line beyond ASCII is
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if not line.isascii() and not is_utf8:
                    place = _not_utf8(line)
                    is_utf8 = place is None and line != codecs.BOM_UTF8
                    wrong = offset + place if wrong is None and place is not None else wrong
                if line.removeprefix(codecs.BOM_UTF8).strip():
                    self._starts.append(offset)
                    self._lines.append(number)
                offset += len(line)
        if wrong is not None and not is_utf8:
            raise not_utf8(self._path, name, wrong)
        self._digest = digest.hexdigest()

    def origin(self, index: int) -> Origin:
        return Origin(self.name, self._lines[index])

    def _read(self, file: BinaryIO, index: int) -> Mapping[str, Any]:
        file.seek(self._starts[index])
        return row_from_json(file.readline(), self.origin(index), "line")


def row_from_json(data: bytes, origin: Origin, field: str) -> Mapping[str, Any]:
    """The row of a JSON text; `field` is what a problem calls the text.

    Raises:
        BadRow: not JSON, not an object, or a key stands twice in one.
    """
    try:
        text = data.decode("utf-8-sig")
        row = ROW_DECODER.decode(text)
    except json.JSONDecodeError as error:
        reason, place = named_fault(text, error)
        column = place - text.rfind("\n", 0, place)
        raise BadRow(origin, field, f"is not JSON (column {column}: {reason})") from error
    except KeyTwice as error:
        raise BadRow(
            origin, error.key, "stands twice in one object of the row: one of its values would be lost"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadRow(origin, field, f"cannot be read as JSON ({why_unreadable(error)})") from error
    if not isinstance(row, dict):
        raise BadRow(origin, "row", f"must be an object of columns, not {kind_of(row)}")
    return row


def _not_utf8(line: bytes) -> int | None:
    """The first byte that is not UTF-8; None where all are."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None
