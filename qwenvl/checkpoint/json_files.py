"""Read the JSON files of a checkpoint, an adapter or a run: whatever is wrong with one is said in a sentence."""

import json
from pathlib import Path
from typing import Any, NoReturn

from qwenvl.checkpoint.own_files import refuse_irregular_file, refuse_lfs_pointer
from qwenvl.errors import InputError

LARGEST_JSON = 1 << 28
"""Bytes. The largest in use are tokenizer files of tens of megabytes."""

_KINDS = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        MissingFileError: there is no such file.
        InputError: the file cannot be read, is not JSON (NaN and infinities are not), names a key twice, or holds
            something other than an object.
    """
    return json_object(read_text(file), file)


def read_text(file: Path) -> str:
    """Read a text in UTF-8.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is no file, an LFS pointer, cannot be read, or is in another encoding.
    """
    refuse_irregular_file(file)
    refuse_lfs_pointer(file)
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise InputError(f"{file} has {file.stat().st_size:,} bytes, too many for a settings file: restore it")
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): check its permissions") from error
    if content.startswith(b"\xef\xbb\xbf"):
        raise InputError(f"{file} starts with a byte order mark, which others cannot read: save it as plain UTF-8")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not a text in UTF-8 (byte {error.start:,}): restore it") from error


def json_object(text: str, file: Path) -> dict[str, Any]:
    """The object in a text of JSON.

    Args:
        file: for the message.

    Raises:
        InputError: as `read_json`.
    """
    if not text.strip():
        raise InputError(f"{file} is empty: restore it")
    try:
        content = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{file} is not JSON ({reason}): restore it") from error
    if not isinstance(content, dict):
        kind = _KINDS.get(type(content), "something else")
        raise InputError(f"{file} holds {kind} where an object is expected: restore it")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")
