"""Rows of a JSON or JSON Lines file, by number.

A JSON Lines file may have millions of rows: of each only the place in the file is kept, 16 bytes, and the row itself
is read when it is asked for. A JSON file is one list and is held in memory as a whole.
"""

import codecs
import json
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from finetune.data.sample import BadRow, DataError, Origin


class Rows(Sequence[Mapping[str, Any]]):
    """Raw rows by number, from 0, as mappings of columns to values; images are not decoded.

    Attributes:
        name: the source, as the recipe names it.
        folder: where relative image paths start and what they must stay in, unless the recipe says another folder.
    """

    name: str
    folder: Path

    def origin(self, index: int) -> Origin:
        """Where row `index` came from."""
        return Origin(self.name, index + 1)

    def scan(self, start: int, stop: int) -> Iterator[Mapping[str, Any] | BadRow]:
        """Rows `start` to `stop` in order, for their text: the bytes of images may be a stand-in.

        A row that cannot be read comes as the error itself, so that the ones after it are read too.
        """
        for index in range(start, stop):
            try:
                yield self[index]
            except BadRow as error:
                yield error

    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digest that changes when the rows do."""


class JsonRows(Rows):
    """The rows of a JSON file that holds a list.

    Raises:
        DataError: no JSON, or no list.
    """

    def __init__(self, path: Path, name: str):
        self.name, self.folder = name, path.parent.absolute()
        data = path.read_bytes()
        self._digest = sha256(data).hexdigest()
        try:
            self._rows = json.loads(data.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{name}: not JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
                "one object a line is JSON Lines: name such a file .jsonl"
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: cannot be read as JSON ({_reason(error)})") from error
        if not isinstance(self._rows, list):
            raise DataError(f"{name}: must hold a list of rows, not {_kind(self._rows)}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return _mapping(self._rows[index], self.origin(index))

    def fingerprint(self) -> str:
        return self._digest


class JsonLinesRows(Rows):
    """The rows of a JSON Lines file (UTF-8; a byte order mark, CRLF and empty lines are fine).

    Opening it reads it once, for the places of the lines and its digest. A line that is no JSON is an error of its own
    row only.

    Raises:
        DataError: UTF-16, or no file of lines at all.
    """

    def __init__(self, path: Path, name: str):
        self.name, self.folder = name, path.parent.absolute()
        self._path = path.absolute()
        self._offsets = array("q")  # bytes from the file's beginning
        self._lines = array("q")  # line numbers, from 1
        digest = sha256()
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise DataError(f"{name}: the file is UTF-16; save it as UTF-8")
                if line.removeprefix(codecs.BOM_UTF8).strip():
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)
        self._digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def origin(self, index: int) -> Origin:
        return Origin(self.name, self._lines[index])

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        # Opened anew each time: loader workers that share an open file would move each other's place in it.
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        return self._row(line, index)

    def scan(self, start: int, stop: int) -> Iterator[Mapping[str, Any] | BadRow]:
        with self._path.open("rb") as file:
            for index in range(start, stop):
                file.seek(self._offsets[index])
                try:
                    yield self._row(file.readline(), index)
                except BadRow as error:
                    yield error

    def fingerprint(self) -> str:
        return self._digest

    def _row(self, line: bytes, index: int) -> Mapping[str, Any]:
        origin = self.origin(index)
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise BadRow(origin, "line", f"is no JSON (column {error.colno}: {error.msg})") from error
        except (ValueError, RecursionError) as error:
            raise BadRow(origin, "line", f"cannot be read as JSON ({_reason(error)})") from error
        return _mapping(row, origin)


class ImageFolderRows(JsonLinesRows):
    """A folder of images with a `metadata.jsonl`, as the datasets library has it: `file_name` (or `file_names`), a
    path within the folder, stands for the column `image` (`images`)."""

    def __init__(self, folder: Path, name: str):
        super().__init__(folder / METADATA, f"{name}/{METADATA}")

    def _row(self, line: bytes, index: int) -> Mapping[str, Any]:
        row = dict(super()._row(line, index))
        for given, column in (("file_name", "image"), ("file_names", "images")):
            if given in row:
                row.setdefault(column, row.pop(given))
        return row


METADATA = "metadata.jsonl"


def _mapping(row: Any, origin: Origin) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise BadRow(origin, "row", f"must be an object of columns, not {_kind(row)}")
    return row


def _kind(value: Any) -> str:
    """JSON's own word for a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is no UTF-8"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
