"""Find the elements of a JSON file that holds a list, of any length, in one pass that keeps none of them.

Objects that stand one after the other, without a list around them, are read as one.

The file is read through a window of a mebibyte, or of one element where that is longer.
"""

import codecs
import json
import re
from array import array
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from finetune.data.sample import DataError
from finetune.data.sources.json_faults import DECODER, named_fault
from finetune.data.sources.text_encoding import not_utf8

CHUNK = 1 << 20
"""Bytes read at once."""
_EDGE = 16  # characters: the longest part of a number, literal or escape that looks wrong without its end
_SPACE = re.compile(r"[ \t\n\r]*")
_KEY = re.compile(r'[ \t\n\r]*("(?:[^"\\]|\\.)*")[ \t\n\r]*:[ \t\n\r]*')
_TURNS = ("messages", "conversations", "prompt")  # lists that a single row holds


def find_elements(path: Path, name: str) -> tuple["array[int]", "array[int]", str]:
    """Where the elements of a file's list begin and end, in bytes from its beginning; and the file's SHA-256.

    Raises:
        DataError: not JSON (with line and column), not a list, or not UTF-8.
    """
    starts, ends = array("q"), array("q")
    with path.open("rb") as file:
        window = _Window(file, name)
        window.skip_space()
        if window.holds_several_objects():
            return *_several_objects(window), window.digest.hexdigest()
        if window.next() != "[":
            window.refuse_other_than_list()
        window.advance(1)
        window.skip_space()
        more = window.next() != "]"
        while more:
            starts.append(window.byte)
            window.skip_value()
            ends.append(window.byte)
            window.skip_space()
            if window.next() not in (",", "]"):
                window.refuse("Expecting ',' delimiter")
            more = window.next() == ","
            if more:
                comma = window.place()
                window.advance(1)
                window.skip_space()
                if window.next() == "]":
                    window.refuse_at("a comma too many before ]", *comma)
        window.advance(1)
        window.skip_space()
        if window.next():
            window.refuse("Extra data")
    return starts, ends, window.digest.hexdigest()


def _several_objects(window: "_Window") -> tuple["array[int]", "array[int]"]:
    starts, ends = array("q"), array("q")
    while window.next():
        if window.next() != "{":
            window.refuse("Extra data" if window.next() != "," else "a comma between objects that are not in a list")
        starts.append(window.byte)
        window.skip_value()
        ends.append(window.byte)
        window.skip_space()
    return starts, ends


class _Window:
    """The part of a file that is being read.

    Attributes:
        text: that part, decoded.
        at: how far it has been read, in characters of `text`.
        byte: the same place in bytes from the file's beginning.
        digest: of what was taken from the file.
    """

    def __init__(self, file: BinaryIO, name: str):
        self.name = name
        self.text, self.at, self.byte = "", 0, 0
        self.digest = sha256()
        self._file = file
        self._taken = 0  # bytes
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._lines = self._column = 0  # before `text`: whole lines, and characters of the line it begins in
        self._values = DECODER
        if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            self.digest.update(codecs.BOM_UTF8)
            self.byte = self._taken = len(codecs.BOM_UTF8)
        else:
            file.seek(0)

    def next(self) -> str:
        """The character to be read, "" at the end."""
        return self.text[self.at : self.at + 1]

    def advance(self, count: int) -> None:
        passed = self.text[self.at : self.at + count]
        self.byte += len(passed) if passed.isascii() else len(passed.encode())
        self.at += count

    def skip_space(self) -> None:
        while True:
            self.advance(_after_space(self.text, self.at) - self.at)
            if self.at < len(self.text) or not self._take():
                return

    def skip_value(self) -> None:
        """Advance past one value.

        Raises:
            DataError: there is none.
        """
        while True:
            try:
                _, end = self._values.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                unfinished = error.pos > len(self.text) - _EDGE or error.msg.startswith("Unterminated string")
                if not (unfinished and self._take()):
                    self.refuse(*named_fault(self.text, error))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.name}: cannot be read as JSON ({why_unreadable(error)})") from error
            else:
                # A number at the end of the window may continue after it.
                if end <= len(self.text) - _EDGE or not self._take():
                    self.advance(end - self.at)
                    return

    def refuse(self, reason: str, place: int | None = None) -> NoReturn:
        """Raise a DataError with line and column of `place`, in characters of `text`; None is the current position."""
        place = self.at if place is None else place
        if reason.startswith("Expecting ',' delimiter"):
            reason, place = named_fault(self.text, json.JSONDecodeError(reason, self.text, place))
        self.refuse_at(reason, *self.place(place))

    def refuse_at(self, reason: str, line: int, column: int) -> NoReturn:
        hint = "; one object a line is JSON Lines: name such a file .jsonl" if reason == "Extra data" else ""
        raise DataError(f"{self.name}: not JSON (line {line}, column {column}: {reason}){hint}")

    def place(self, place: int | None = None) -> tuple[int, int]:
        """Line and column of `place`, in characters of `text`; None is the current position."""
        place = self.at if place is None else place
        newline = self.text.rfind("\n", 0, place)
        column = place - newline if newline >= 0 else self._column + place + 1
        return self._lines + self.text.count("\n", 0, place) + 1, column

    def holds_several_objects(self) -> bool:
        """Whether an object begins here, and another one after it, as far as the window shows."""
        if self.next() != "{":
            return False
        try:
            _, end = self._values.raw_decode(self.text, self.at)
        except (ValueError, RecursionError):
            return False
        end = _after_space(self.text, end)
        return self.text[end : end + 1] == "{"

    def refuse_other_than_list(self) -> NoReturn:
        first = self.next()
        if first != "{":
            self.skip_value()  # raises where it is not JSON
            kind = {'"': "text", "t": "a truth value", "f": "a truth value", "n": "null"}.get(first, "a number")
            raise DataError(f"{self.name}: must hold a list of rows, not {kind}")
        key, remedy = self._first_list(), ""
        if key in _TURNS:
            remedy = "; if it is one row, put [ and ] around it"
        elif key is not None:
            remedy = (
                f'; if the rows are under "{key}", write that list to a file of its own: python -c "import json; '
                f"json.dump(json.load(open('{self.name}'))['{key}'], open('rows.json', 'w'))\""
            )
        raise DataError(f"{self.name}: must hold a list of rows, not an object{remedy}")

    def _first_list(self) -> str | None:
        """The first key of an object whose value is a list, as far as the window shows."""
        at = self.at + 1
        while key := _KEY.match(self.text, at):
            if self.text[key.end() : key.end() + 1] == "[":
                return json.loads(key[1])
            try:
                _, end = self._values.raw_decode(self.text, key.end())
            except (ValueError, RecursionError):
                return None
            at = _after_space(self.text, end) + 1
        return None

    def _take(self) -> bool:
        """Drop what was read and read on, at least as much as is left in the window; False at the file's end."""
        data = self._file.read(max(CHUNK, len(self.text) - self.at))
        self.digest.update(data)
        try:
            more = self._decode(data, final=not data)
        except UnicodeDecodeError as error:
            place = self._taken - (len(error.object) - len(data)) + error.start
            raise not_utf8(Path(self._file.name), self.name, place) from error
        self._taken += len(data)
        if not data:
            return False
        newline = self.text.rfind("\n", 0, self.at)
        self._lines += self.text.count("\n", 0, self.at)
        self._column = self.at - newline - 1 if newline >= 0 else self._column + self.at
        self.text, self.at = self.text[self.at :] + more, 0
        return True


def _after_space(text: str, at: int) -> int:
    """The first place from `at` on that is not white space."""
    space = _SPACE.match(text, at)
    assert space is not None, "the pattern matches no characters as well"
    return space.end()


def why_unreadable(error: Exception) -> str:
    """Why JSON that may be well-formed cannot be read."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


def kind_of(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
