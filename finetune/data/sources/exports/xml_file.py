"""XML as a sequence of the elements right below its root, read strictly: nothing that could refer or expand.

A document type, and so every entity that a file could define, is refused (expat knows the five of XML itself). What is
nested deeper than any of the layouts, or has more than one root, is refused as well.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from finetune.data.sample import DataError
from finetune.data.sources.local_files import open_data

CHUNK = 1 << 16
"""Bytes given to the parser at once."""
DEEPEST = 32
"""Elements inside one another."""


class _Refused(Exception):
    """Why a file is not read."""


def read_xml(path: Path, name: str, root: str) -> Iterator[Element]:
    """The elements below the root, one after the other, none of them kept.

    Args:
        path, name: the file, and what messages call it.
        root: the name that the root must have.

    Raises:
        DataError: it cannot be read, is not XML, has a document type, or another root.
    """
    builder = TreeBuilder()
    ready: list[Element] = []
    depth = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, builder
        depth += 1
        if depth > DEEPEST:
            raise _Refused(f"has elements nested deeper than {DEEPEST}")
        if depth == 1 and tag != root:
            raise _Refused(f"its root is <{tag[:60]}>, and must be <{root}>")
        if depth == 2:
            builder = TreeBuilder()
        if depth > 1:
            builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        if depth > 1:
            builder.end(tag)
        if depth == 2:
            ready.append(builder.close())
        depth -= 1

    def data(text: str) -> None:
        if depth > 1:
            builder.data(text)

    def refuse(*_: object) -> NoReturn:
        raise _Refused("has a document type or entities (<!DOCTYPE ...>), which are not read: take them out")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, data
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.ExternalEntityRefHandler = refuse
    with open_data(path) as file:
        is_last = False
        while not is_last:
            chunk = file.read(CHUNK)
            is_last = not chunk
            try:
                parser.Parse(chunk, is_last)
            except _Refused as error:
                raise DataError(f"{name}: {error}") from None
            except expat.ExpatError as error:
                place = f"line {error.lineno}, column {error.offset + 1}"
                raise DataError(f"{name}: not XML ({place}: {expat.ErrorString(error.code)})") from error
            except (ValueError, LookupError) as error:  # an encoding that Python does not know, or not so
                raise DataError(f"{name}: cannot be read as XML ({str(error)[:200]})") from error
            yield from ready
            ready.clear()
