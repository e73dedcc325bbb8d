"""Read the fields of a row strictly: a wrong type is an error that names the field, never converted silently.

Datasets fill keys that only other rows have with None, so None means the same as a missing key.
"""

import re
from collections.abc import Mapping
from numbers import Real
from typing import Any

from finetune.data.sample import UNKNOWN_TEXT, BadField

IMAGE_KEYS = {"bytes", "path", "page"}
_WRITTEN_LIST = re.compile(r"""\s*\[\s*(?:(['"]).*\1\s*)?\]\s*""", re.DOTALL)


def field(row: Mapping[str, Any], column: str) -> Any:
    """The value of a required column.

    Raises:
        BadField: it is missing, or None.
    """
    value = row.get(column)
    if value is None:
        if column in row:
            raise BadField(column, "is empty in this row")
        there = ", ".join(str(key) for key, value in row.items() if value is not None)
        raise BadField(column, f"is missing; the row has {there[:200] or 'nothing'}. Name the column under `columns`")
    return value


def refuse_unknown_text(value: Any, name: str) -> None:
    """Refuse a cell of a workbook that shows something else than its value.

    Raises:
        BadField: it is one.
    """
    if isinstance(value, Mapping) and UNKNOWN_TEXT in value:
        raise BadField(
            name,
            f"the sheet shows this cell in a way that is not known here ({value[UNKNOWN_TEXT]}): write what it shows "
            'as text, as =TEXT(C2, "dd.mm.yyyy") gives it, or set its number format to yyyy-mm-dd, 0.00 or General',
        )


def text(value: Any, name: str) -> str:
    """The value, which must be text that is not blank.

    Raises:
        BadField: not a string, or a blank one.
    """
    if not isinstance(value, str):
        refuse_unknown_text(value, name)
        raise BadField(name, f"must be text, not {type(value).__name__}")
    if not value.strip():
        raise BadField(name, "is blank")
    return value


def one_text(value: Any, name: str) -> str:
    """The value of a column that may hold a list of texts, where it holds one text.

    Raises:
        BadField: as `text`; or it is a list as Python or JSON writes it, which the cells of tables often hold: its
            brackets and quotes would be words.
    """
    written = text(value, name)
    if _WRITTEN_LIST.fullmatch(written):
        raise BadField(
            name,
            f"is a list written as text ({written[:60]}): give one text, or a list, as JSON Lines and Parquet have it",
        )
    return written


def image(value: Any, name: str) -> Any:
    """An image source: a path, URL or data URI, encoded bytes, or {"bytes", "path"} as the datasets library has it.

    `file.pdf#3`, or a third key `page`, names one page. Only its kind is checked; nothing is opened.

    Raises:
        BadField: anything else.
    """
    if isinstance(value, str):
        if not value.strip():
            raise BadField(name, "the path is empty")
        return value
    if isinstance(value, bytes):
        return value
    if isinstance(value, Mapping):
        page = value.get("page")
        if page is not None and (isinstance(page, bool) or not isinstance(page, int) or page < 1):
            raise BadField(f"{name}.page", f"must be a whole number from 1, not {page!r}"[:200])
        if set(value) <= IMAGE_KEYS and isinstance(value.get("bytes"), bytes):
            named = {} if page is None else {"page": page}
            return {"bytes": value["bytes"], "path": value.get("path"), **named}
        if set(value) <= IMAGE_KEYS and value.get("bytes") is None and isinstance(value.get("path"), str):
            path = image(value["path"], name)
            return path if page is None else f"{path}#{page}"
        raise BadField(name, f"must hold `bytes` or a `path`; it has keys {sorted(map(str, value))}"[:200])
    raise BadField(name, f"must be a path, encoded bytes or {{bytes, path}}, not {type(value).__name__}")


def images(row: Mapping[str, Any], column: str) -> list[Any]:
    """The images of a column that holds one, a list of them, or nothing.

    Raises:
        BadField: as `image`.
    """
    value = row.get(column)
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [image(item, f"{column}[{index}]") for index, item in enumerate(value)]
    return [image(value, column)]


def mappings(value: Any, name: str) -> list[Mapping[str, Any]]:
    """The value, which must be a list of mappings that is not empty.

    Raises:
        BadField: anything else.
    """
    if not isinstance(value, list | tuple):
        raise BadField(name, f"must be a list, not {type(value).__name__}")
    if not value:
        raise BadField(name, "is empty")
    for index, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise BadField(f"{name}[{index}]", f"must be a mapping, not {type(item).__name__}")
    return list(value)


def numbers(value: Any, name: str, count: int) -> list[float]:
    """The value, which must be a list of `count` numbers.

    Raises:
        BadField: anything else, booleans included.
    """
    if not isinstance(value, list | tuple) or len(value) != count:
        shown = f"{len(value)} values" if isinstance(value, list | tuple) else type(value).__name__
        raise BadField(name, f"must be a list of {count} numbers, not {shown}")
    for index, number in enumerate(value):
        if isinstance(number, bool) or not isinstance(number, Real):
            raise BadField(f"{name}[{index}]", f"must be a number, not {type(number).__name__}")
    return list(value)
