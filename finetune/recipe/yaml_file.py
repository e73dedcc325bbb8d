"""YAML as recipes use it: plain values, each with its line.

Only PyYAML's parser is used. What it would build from tags is never built, so nothing in a file can run. Plain values
are read by the rules of YAML 1.2, which people expect: `2e-4` is a number, `no` is text. Keys are always text. A key
that stands twice, a tag, a merge key and a second document are problems; anchors and aliases work, up to a size.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from finetune.recipe.problems import Place, Problem, RecipeError, dotted

MAX_BYTES = 256 * 1024
"""Of a file: a recipe is a page of text."""
MAX_VALUES = 10_000
"""Values in a document, with aliases written out: aliases of aliases grow without bound."""
MAX_DEPTH = 20
"""Lists and mappings within each other."""

INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan")

KeyPath = tuple[str | int, ...]


@dataclass
class Document:
    """A YAML document as plain values, and where each was written."""

    value: Any
    places: dict[KeyPath, Place] = field(default_factory=dict)
    """Of each key and list item, by its path; `()` is the document itself."""
    problems: list[tuple[KeyPath, Problem]] = field(default_factory=list)
    """What is wrong, with the path of the value; the rest could be read."""

    def place(self, path: KeyPath) -> Place:
        """Where `path` was written; where it was not, the place of its nearest parent."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places[path]


def read_file(path: Path) -> str:
    """The text of a recipe file.

    Raises:
        RecipeError: it is not there, not a file, not UTF-8 or too large.
    """

    def refuse(reason: str, line: int = 1) -> RecipeError:
        return RecipeError([Problem(Place(str(path), line), "", reason)])

    try:
        if path.is_dir():
            raise refuse("is a folder; give the recipe file in it")
        if not path.exists():
            raise refuse("there is no such file")
        if not path.is_file():
            raise refuse("is not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise refuse(f"is larger than {MAX_BYTES // 1024} KiB; a recipe is a page of text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise refuse("is not UTF-8 text; save it as UTF-8", line) from error


def read_yaml(text: str, file: str, override: str | None = None) -> Document:
    """Read one document.

    Args:
        text: the YAML.
        file: its name, for places.
        override: the override that `text` is the value of, if it is.

    Raises:
        RecipeError: a syntax error, or a document beyond the limits above.
    """
    reader = _Reader(text, file, override)
    try:
        node = reader.read()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = f"not readable as YAML: {error.problem or error.context}"
        remedy = ""
        if "'\\t'" in reason:
            reason, remedy = "a tab where YAML wants spaces", "indent with spaces"
        elif override is not None:
            remedy = "put text with special characters in quotes"
        raise RecipeError([*reader.found(), Problem(reader.place(mark), "", reason, remedy)]) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        reason = f"a character that YAML does not allow: {chr(error.character)!r}"
        raise RecipeError([Problem(Place(file, line, 1, override), "", reason)]) from error
    document = Document(None, problems=reader.problems)
    document.value = _flatten(node, (), document.places)
    return document


def plain_value(text: str) -> Any:
    """What an unquoted value means: null, true, false, a number, or text."""
    if text in ("", "~", "null"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if INTEGER.fullmatch(text):
        return int(text)
    if NUMBER.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return text


@dataclass
class _Node:
    """A value with its place; lists and mappings hold nodes.

    Aliases share one node. `size` counts it as often as it is used, so that nested aliases are refused before they are
    written out.
    """

    value: Any
    place: Place
    size: int = 1


class _Mark(Protocol):
    """A place in PyYAML's words: line and column from 0."""

    line: int
    column: int


class _Reader:
    """Turns PyYAML's events into nodes, and collects what is wrong on the way."""

    def __init__(self, text: str, file: str, override: str | None):
        self.file, self.override = file, override
        self.events = yaml.parse(text, Loader=yaml.SafeLoader)
        self.anchors: dict[str | None, _Node] = {}
        self.problems: list[tuple[KeyPath, Problem]] = []

    def place(self, mark: _Mark | None) -> Place:
        if mark is None or self.override is not None:
            return Place(self.file, override=self.override)
        return Place(self.file, mark.line + 1, mark.column + 1)

    def found(self) -> list[Problem]:
        return [problem for _, problem in self.problems]

    def read(self) -> _Node:
        next(self.events)  # the start of the stream
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            return _Node(None, self.place(None))
        root = self._node(next(self.events), ())
        next(self.events)  # the end of the document
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            self._problem((), event, "a second document begins here", "a recipe is one document: remove the ---")
        return root

    def _problem(self, path: KeyPath, event: yaml.Event, reason: str, remedy: str = "") -> None:
        self.problems.append((path, Problem(self.place(event.start_mark), dotted(path), reason, remedy)))

    def _node(self, event: yaml.Event, path: KeyPath) -> _Node:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                self._problem(
                    path, event, f"*{event.anchor} names no anchor before it", f"mark one with &{event.anchor}"
                )
                return _Node(None, self.place(event.start_mark))
            return self.anchors[event.anchor]
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent), "all other events end something"
        if event.tag is not None:
            self._problem(path, event, f"the tag {event.tag} is not allowed", "write the value plainly")
        if len(path) > MAX_DEPTH:
            raise self._too_much(path, event, f"nested deeper than {MAX_DEPTH} levels")
        node = _Node(None, self.place(event.start_mark))
        if isinstance(event, yaml.ScalarEvent):
            node.value = self._scalar(event, path)
        elif isinstance(event, yaml.SequenceStartEvent):
            node.value = self._list(node, path)
        else:
            node.value = self._mapping(node, path)
        if node.size > MAX_VALUES:
            raise self._too_much(path, event, f"more than {MAX_VALUES} values, aliases counted as often as used")
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _too_much(self, path: KeyPath, event: yaml.Event, reason: str) -> RecipeError:
        return RecipeError([*self.found(), Problem(self.place(event.start_mark), dotted(path), reason)])

    def _scalar(self, event: yaml.ScalarEvent, path: KeyPath) -> Any:
        if event.style is not None:
            return event.value
        try:
            return plain_value(event.value)
        except ValueError:  # Python refuses whole numbers of thousands of digits
            self._problem(path, event, "a number with too many digits")
            return None

    def _list(self, node: _Node, path: KeyPath) -> list[_Node]:
        items: list[_Node] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self._node(event, (*path, len(items))))
            node.size += items[-1].size
        return items

    def _mapping(self, node: _Node, path: KeyPath) -> dict[str, tuple[Place, _Node]]:
        pairs: dict[str, tuple[Place, _Node]] = {}
        while not isinstance(key := next(self.events), yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent):
                self._problem(path, key, "a key that is not text", "write keys as plain words")
                self._node(key, (*path, "?"))
                self._node(next(self.events), (*path, "?"))
                continue
            here = (*path, key.value)
            value = self._node(next(self.events), here)
            node.size += value.size
            if key.tag is not None:
                self._problem(here, key, f"the tag {key.tag} is not allowed", "write the key plainly")
            if key.value == "<<" and key.style is None:
                self._problem(here, key, "merge keys are not read", "write the keys out, or alias single values")
            elif key.value in pairs:
                first = pairs[key.value][0]
                where = "" if self.override is not None else f", first in line {first.line}"
                self._problem(here, key, f"this key stands twice{where}", "keep one of the two")
            else:
                pairs[key.value] = self.place(key.start_mark), value
        return pairs


def _flatten(node: _Node, path: KeyPath, places: dict[KeyPath, Place]) -> Any:
    places.setdefault(path, node.place)
    if isinstance(node.value, list):
        return [_flatten(item, (*path, index), places) for index, item in enumerate(node.value)]
    if isinstance(node.value, dict):
        values = {}
        for key, (place, item) in node.value.items():
            places[(*path, key)] = place
            values[key] = _flatten(item, (*path, key), places)
        return values
    return node.value


class _Writer(yaml.SafeDumper):
    """Quotes text that these rules, or those of YAML 1.1, would read as something else."""

    def text(self, text: str) -> yaml.ScalarNode:
        # PyYAML leaves Unicode's own line breaks in plain text, where its reader makes spaces of them.
        style = '"' if any(mark in text for mark in "\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    def ignore_aliases(self, data: object) -> bool:
        return True


_Writer.add_representer(str, _Writer.text)
_Writer.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{NUMBER.pattern})$"), list("-+.0123456789"))


def write_yaml(value: Any) -> str:
    """Plain values as YAML that `read_yaml` and YAML 1.1 readers understand alike."""
    return yaml.dump(value, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=118)
