"""Rows of an Excel workbook (.xlsx): one sheet, its first row with the names of the columns.

A cell is the text that the sheet shows: numbers in their plain formats (`0`, `0.00`, `#,##0.00`, `0%`), and dates as
`yyyy-mm-dd`. What is shown in any other format (a currency, a local date) is known by its value only: every format
refuses that by name where it reads the cell. The rows are written once as JSON Lines in the datasets cache, on the
lines that they have in the sheet, and read from there.
"""

import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time, timedelta
from decimal import ROUND_HALF_UP, Decimal
from hashlib import sha256
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from finetune.data.sample import UNKNOWN_TEXT, DataError
from finetune.data.sources.rows import JsonLinesRows
from finetune.data.sources.text_encoding import copy_of, refuse_swelling
from finetune.files.atomic_writes import writing_file

_NUMBER = re.compile(r"(?P<groups>#,##)?(?P<whole>0+)(?:\.(?P<digits>0+))?(?P<percent>%)?")
_MERGED = re.compile(rb"<(?:\w+:)?mergeCell\s[^>]*?ref=\"([A-Z0-9:$]+)\"")
_ISO = re.compile(r"yyyy\\?-mm\\?-dd", re.IGNORECASE)
_MOST_ROWS = 1 << 20
_VERSION = 3  # of what is made of a sheet


def read_workbook(path: Path, name: str, sheet: str | None) -> JsonLinesRows:
    """The rows of a sheet; None is the only one that holds something.

    Raises:
        DataError: no workbook, no such sheet, several of them, a column without a name, a formula whose result is not
            stored, or an error in a cell.
    """
    digest = sha256(f"xlsx {_VERSION} {sheet} ".encode() + path.read_bytes()).hexdigest()
    with copy_of(f"{digest[:40]}.jsonl") as (copy, is_there):
        if not is_there:
            try:
                with zipfile.ZipFile(path) as packed:
                    refuse_swelling(name, path.stat().st_size, sum(part.file_size for part in packed.infolist()))
                lines = list(_lines(path, name, sheet))
            except DataError:
                raise
            except Exception as error:  # whatever a damaged file raises, in several libraries
                raise DataError(
                    f"{name}: cannot be read as an Excel workbook ({type(error).__name__}: {error})"
                ) from error
            with writing_file(copy) as partial:
                partial.write_text("".join(lines), encoding="utf-8")
    return JsonLinesRows(path, name, copy)


def _lines(path: Path, name: str, sheet: str | None) -> Iterator[str]:
    import openpyxl

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a workbook has besides cells
        # Results and formulas are two ways to read the file.
        results, formulas = (openpyxl.load_workbook(path, read_only=True, data_only=only) for only in (True, False))
        try:
            title = _sheet(results, name, sheet)
            for book in (results, formulas):
                book[title].reset_dimensions()  # written by other programs, and not always right
            merged = _merged_cells(path, results[title])
            rows = zip_longest(results[title].iter_rows(), formulas[title].iter_rows(), fillvalue=())
            header: list[str | None] = []
            for number, (cells, written) in enumerate(rows):
                if number >= _MOST_ROWS:
                    raise DataError(f"{name}: has a row beyond {_MOST_ROWS:,}, the last one that Excel has")
                values = [_value(cell, source, name) for cell, source in zip(cells, written, strict=True)]
                for cell, value in zip(cells, values, strict=True):
                    if value is not None and (area := merged.get((cell.row, cell.column))):
                        raise DataError(
                            f"{name}: the cells {area} are one, and only the first has its value: unmerge them and "
                            "fill each"
                        )
                while values and values[-1] is None:
                    values.pop()
                if values and not header:
                    header = _header(values, name)
                    values = []
                yield (_row(header, values, cells, name) if values else "") + "\n"
            if not header:
                raise DataError(f"{name}: is empty; its first row must name the columns")
        finally:
            results.close()
            formulas.close()


def _merged_cells(path: Path, sheet: Any) -> dict[tuple[int, int], str]:
    """(row, column) of the first cell of each merged area -> the area, such as `A2:A5`."""
    from openpyxl.utils import range_boundaries

    # A sheet that is read row by row does not tell them.
    with zipfile.ZipFile(path) as archive:
        found = _MERGED.findall(archive.read(sheet._worksheet_path))
    areas = [area.decode().replace("$", "") for area in found]
    bounds = [(area, range_boundaries(area)) for area in areas]
    return {(top, left): area for area, (left, top, right, bottom) in bounds if (left, top) != (right, bottom)}


def _sheet(book: Any, name: str, sheet: str | None) -> str:
    titles = [each.title for each in book.worksheets]
    if sheet is not None:
        if sheet not in titles:
            raise DataError(f"{name}: has no sheet {sheet!r} (split) but {', '.join(titles)}")
        return sheet
    filled = [
        each.title
        for each in book.worksheets
        if any(any(row) for row in islice(each.iter_rows(values_only=True), _MOST_ROWS))
    ]
    if len(filled) > 1:
        raise DataError(f"{name}: has the sheets {', '.join(filled)}; say which one with `split`")
    return filled[0] if filled else titles[0]


def _header(values: Sequence[Any], name: str) -> list[str | None]:
    header = [value if isinstance(value, str) and value.strip() else None for value in values]
    named = [value for value in header if value is not None]
    if len(set(named)) < len(named) or any(
        value is not None and column is None for value, column in zip(values, header, strict=True)
    ):
        raise DataError(f"{name}: its first row must name every column, each once; it is {list(values)}"[:500])
    return header


def _row(header: Sequence[str | None], values: Sequence[Any], cells: Sequence[Any], name: str) -> str:
    row = {column: None for column in header if column is not None}
    for number, value in enumerate(values):
        column = header[number] if number < len(header) else None
        if column is not None:
            row[column] = value
        elif value is not None:
            raise DataError(f"{name}: cell {cells[number].coordinate} is in a column without a name; name it in row 1")
    return json.dumps(row, ensure_ascii=False)


def _value(cell: Any, source: Any, name: str) -> Any:
    """What a cell shows, as text; a mapping, which no format reads as text, where that is not known; None where it is
    empty."""
    value = cell.value
    if value is None:
        if source.value is not None:
            raise DataError(
                f"{name}: cell {source.coordinate} holds a formula without its result; open the file in Excel or "
                "LibreOffice and save it"
            )
        return None
    if cell.data_type == "e":
        raise DataError(f"{name}: cell {cell.coordinate} holds the error {value}; mend or empty it")
    if isinstance(value, str):
        return value or None
    if isinstance(value, bool):
        return str(value).upper()
    shown = cell.number_format
    if isinstance(value, datetime) and value.time() == time() and _ISO.fullmatch(shown):
        return value.date().isoformat()
    if isinstance(value, datetime | date | time | timedelta):
        return {UNKNOWN_TEXT: f"{source.coordinate}, number format {shown}, value {value}"}
    if shown in ("General", "@"):
        text = str(value) if isinstance(value, int) else f"{value:.15g}"
        return {UNKNOWN_TEXT: f"{source.coordinate}, value {text}"} if "e" in text else text
    form = _NUMBER.fullmatch(shown)
    if form is None:
        return {UNKNOWN_TEXT: f"{source.coordinate}, number format {shown}, value {value}"}
    number = Decimal(repr(value)) * (100 if form["percent"] else 1)
    number = number.quantize(Decimal(1).scaleb(-len(form["digits"] or "")), ROUND_HALF_UP)
    text = f"{abs(number):{',' if form['groups'] else ''}f}"
    # 0000 shows 7 as 0007.
    whole, point, digits = text.partition(".")
    return f"{'-' if number < 0 else ''}{whole.zfill(len(form['whole']))}{point}{digits}{form['percent'] or ''}"
