"""Rows of a CSV or TSV file, by number: a header, then a record for each row; every value is text.

Nothing is converted to a number or a date: an answer of `007` stays so. An empty field is a missing value.

What is between the fields is found where only one of the usual marks divides the header and the first records alike.
"""

import codecs
import csv
import io
from array import array
from collections.abc import Iterator, Mapping
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from finetune.data.sample import BadRow, DataError, Origin
from finetune.data.sources.local_files import open_data
from finetune.data.sources.rows import Rows
from finetune.data.sources.text_encoding import kind_of_file, not_utf8

DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
"""File kind -> what is between its fields, unless the file shows something else. Excel's "Unicode text" is .txt."""
_USUAL = (",", "\t", ";", "|")
_TRIED = 20  # records
_LONGEST_FIELD = 1 << 26  # bytes; Python's own limit of 128 KiB is less than an image in Base64
csv.field_size_limit(_LONGEST_FIELD)


class CsvRows(Rows):
    """The rows of a CSV file (UTF-8, quoted as in RFC 4180; quoted fields may hold line breaks).

    The constructor reads the file once, for the positions of the records and a digest; 24 bytes a row are kept.

    Args:
        path, name: see `Rows`.
        delimiter: between fields; None is what the file shows.
        text: a file with its text as UTF-8; None where it is that itself.

    Raises:
        DataError: not UTF-8, quotes that do not match, no header, or a header that does not name every column once;
            or several characters could be between the fields.
    """

    def __init__(self, path: Path, name: str, delimiter: str | None = None, text: Path | None = None):
        self.name, self.folder = name, path.parent.absolute()
        self._path = (text or path).absolute()
        usual = DELIMITERS.get(kind_of_file(path), ",")
        self._delimiter = delimiter or _find_delimiter(self._path, name, usual)
        self._offsets = array("q", [0])  # bytes; of record i (the header is 0) and, last, of the end
        self._lines = array("q", [1])  # the line that the record begins in, from 1
        self._header: list[str] = []
        with self._path.open("rb") as file:
            lines = _Lines(file, name)
            records = csv.reader(lines, delimiter=self._delimiter, strict=True)
            try:
                for record in records:
                    if not self._header:
                        self._header = self._checked_header(record)
                    if record:
                        self._offsets.append(lines.bytes)
                        self._lines.append(records.line_num + 1)
                    else:  # an empty line: the record after it begins later
                        self._offsets[-1], self._lines[-1] = lines.bytes, records.line_num + 1
            except csv.Error as error:
                reason = str(error)
                if "field larger than" in reason:
                    reason = f"a field has more than {_LONGEST_FIELD >> 20} MiB; is its quote closed?"
                raise DataError(
                    f"{name}: line {records.line_num}: {reason}; the rows after it cannot be read"
                ) from error
        if not self._header:
            raise DataError(f"{name}: is empty; its first line must name the columns")
        if self._delimiter != usual:
            lines.digest.update(f"delimiter {self._delimiter}".encode())
        self._digest = lines.digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets) - 2

    def origin(self, index: int) -> Origin:
        return Origin(self.name, self._lines[range(len(self))[index] + 1])

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        record = range(len(self))[index] + 1
        with open_data(self._path) as file:
            file.seek(self._offsets[record])
            data = file.read(self._offsets[record + 1] - self._offsets[record])
        # Lines end at \n only, as they did when their positions were noted.
        lines = io.StringIO(data.decode(errors="replace"), newline="\n")
        values = next(csv.reader(lines, delimiter=self._delimiter), [])
        if len(values) != len(self._header):
            raise BadRow(
                self.origin(index),
                "row",
                f"has {len(values)} fields, and the header {len(self._header)}: quote a field that holds "
                f"{self._delimiter!r}",
            )
        return {column: value or None for column, value in zip(self._header, values, strict=True)}

    def fingerprint(self) -> str:
        return self._digest

    def _checked_header(self, header: list[str]) -> list[str]:
        if not all(column.strip() for column in header) or len(set(header)) < len(header):
            raise DataError(f"{self.name}: its first line must name every column, each once; it is {header}"[:500])
        return header


class _Lines(Iterator[str]):
    """The lines of a file as text; `bytes` and `digest` are of those that were read."""

    def __init__(self, file: BinaryIO, name: str):
        self._file, self._name = file, name
        self.bytes, self.digest = 0, sha256()

    def __next__(self) -> str:
        line = next(self._file)
        self.digest.update(line)
        bom = len(codecs.BOM_UTF8) if not self.bytes and line.startswith(codecs.BOM_UTF8) else 0
        try:
            text = line[bom:].decode()
        except UnicodeDecodeError as error:
            place = self.bytes + bom + error.start
            raise not_utf8(Path(self._file.name), self._name, place) from error
        self.bytes += len(line)
        return text


def _find_delimiter(path: Path, name: str, usual: str) -> str:
    """What is between the fields of a file.

    Args:
        usual: of files of this kind; of two that are as good, and where nothing is between them.

    Raises:
        DataError: not UTF-8, or the header is divided by several.
    """
    with path.open("rb") as file:
        head = list(islice(_Lines(file, name), _TRIED))
    found = {delimiter: _columns(head, delimiter) for delimiter in _USUAL}
    dividing = [delimiter for delimiter, (columns, _) in found.items() if columns > 1]
    if usual in dividing and (found[usual][1] or not any(found[delimiter][1] for delimiter in dividing)):
        return usual
    if len(dividing) > 1:
        dividing = [delimiter for delimiter in dividing if found[delimiter][1]]
    if len(dividing) > 1 or (not dividing and any(columns > 1 for columns, _ in found.values())):
        marks = ", ".join(map(repr, dividing or [mark for mark, (columns, _) in found.items() if columns > 1]))
        raise DataError(f"{name}: its columns could be divided by {marks}; say which with `delimiter`")
    return dividing[0] if dividing else usual


def _columns(lines: list[str], delimiter: str) -> tuple[int, bool]:
    """Columns of the header, and whether the records among these lines have as many fields."""
    try:
        records = [record for record in csv.reader(lines, delimiter=delimiter) if record]
    except csv.Error:
        return 0, False
    columns = len(records[0]) if records else 0
    # The last record may go on after these lines.
    whole = records[1:] if len(lines) < _TRIED else records[1:-1]
    return columns, all(len(record) == columns for record in whole)
