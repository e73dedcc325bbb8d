"""The JSON file of an export, read whole and strictly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from finetune.data.sample import DataError
from finetune.data.sources.json_faults import each_key_once
from finetune.data.sources.json_list import why_unreadable
from finetune.data.sources.local_files import open_data


def read_json(path: Path, name: str, changed: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value of a JSON file.

    Args:
        path, name: the file, and what messages call it.
        changed: called with each object as it is read; what it returns stands in its place.

    Raises:
        DataError: it cannot be read, is not JSON, or has a key twice in one object.
    """
    with open_data(path) as file:
        data = file.read()

    def as_read(pairs: list[tuple[str, Any]]) -> Any:
        return each_key_once(pairs) if changed is None else changed(each_key_once(pairs))

    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=as_read, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{name}: not JSON ({place}: {error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: cannot be read as JSON ({why_unreadable(error)})") from error


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def missing(name: str, key: str, there: Any, remedy: str = "") -> DataError:
    """The error for a key that a layout must have."""
    keys = ", ".join(map(repr, list(there)[:10])) or "nothing"
    return DataError(f"{name}: there is no list {key!r} in it; it has {keys}{remedy}"[:700])
