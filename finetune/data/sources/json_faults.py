"""What is wrong with a text that is not JSON, in words that say what to change."""

import json
import re
from typing import Any

_WORDS = {"None": "null", "True": "true", "False": "false", "nan": "null", "undefined": "null"}
"""Values of Python and JavaScript that are not JSON -> what they are there."""
_WORD = re.compile(r"[A-Za-z_]+")
_BEFORE = re.compile(r"(.)[ \t\n\r]*\Z", re.DOTALL)


def named_fault(text: str, error: json.JSONDecodeError) -> tuple[str, int]:
    """The reason, and its place in `text`, for an error of the json module at `error.pos`.

    The text needs only to be whole around that place.
    """
    place, reason = error.pos, error.msg
    there = text[place : place + 1]
    before = _BEFORE.search(text, max(place - 4096, 0), place)
    # Newer versions of Python name a trailing comma themselves, at the comma.
    if there == "," and reason.startswith("Illegal trailing comma"):
        return _comma_too_many(text, place), place
    if there and there in "}]" and before is not None and before[1] == ",":
        return f"a comma too many before {there}", before.start()
    if there == ",":
        return "a comma too many", place
    if there == "'" and reason.startswith("Expecting"):
        return "single quotes: JSON has double ones", place
    if there and there in '"{[' and reason == "Expecting ',' delimiter":
        return f"a comma is missing before this {there}", place
    word = _WORD.match(text, place)
    if word is not None and word[0] in _WORDS:
        return f"{word[0]} is not JSON, write {_WORDS[word[0]]}", place
    if there == "/" and text[place + 1 : place + 2] in ("/", "*"):
        return "a comment: JSON has none", place
    if there and there in "“”‘’":
        return f"{there} is a typographer's quote: JSON has the plain double one", place
    if word is not None and reason.startswith("Expecting property name"):
        return f"the key {word[0]} needs double quotes around it", place
    return reason, place


def _comma_too_many(text: str, place: int) -> str:
    after = text[place + 1 :].lstrip()[:1]
    return f"a comma too many before {after}" if after else "a comma too many"


def _missing(constant: str) -> float | None:
    # What pandas and json.dumps write for a value that is not there. An infinite number stays one.
    return None if constant == "NaN" else float(constant.replace("Infinity", "inf"))


class KeyTwice(ValueError):
    """A key stands twice in one object, so that one of its values would be lost.

    Attributes: `key`.
    """

    def __init__(self, key: str):
        super().__init__(f"the key {key!r} stands twice in one object")
        self.key = key


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON by its keys and values.

    Raises:
        KeyTwice: it has a key twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise KeyTwice(next(key for place, key in enumerate(keys) if key in keys[:place]))
    return found


DECODER = json.JSONDecoder(parse_constant=_missing)
"""Reads JSON, and NaN as null."""
ROW_DECODER = json.JSONDecoder(parse_constant=_missing, object_pairs_hook=each_key_once)
"""The same, where the values are wanted and not only their ends."""
