"""Cut a source into rows to train on and rows to evaluate on, whole documents at a time.

Rows that share an image stay together, also over several rows (1 and 2 share one image, 2 and 3 another one); or rows
with the same value in a column. Which part a document falls into depends on its name and a seed alone: rows that are
added later do not move those that were there, unless they join two documents.
"""

import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, Literal, Protocol

from finetune.data.formats import fields
from finetune.data.formats.llava import column_of_images
from finetune.data.formats.row_format import COLUMNS, RowFormat
from finetune.data.message_parts import image_sources
from finetune.data.row_progress import RowProgress
from finetune.data.sample import BadField, BadRow, DataError, Origin
from finetune.data.sources.rows import Rows
from finetune.data.sources.sources import Location, open_rows

_PAGE = re.compile(r"(\.(?:pdf|tiff?|gif|webp|png))#.*", re.IGNORECASE | re.DOTALL)


class Part(Protocol):
    """One of the two parts of a source; see `recipe.sources.Part`."""

    @property
    def eval(self) -> float: ...
    @property
    def by(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def take(self) -> Literal["train", "eval"]: ...


class CutSource(Location, Protocol):
    """A source of which one part is read, or all of it where `part` is None."""

    @property
    def columns(self) -> Mapping[str, str]: ...
    @property
    def part(self) -> Part | None: ...


def read_part(source: CutSource, row_format: str, images_root: str | Path | None) -> Rows:
    """The rows of a source, or of its part; `limit` counts before the cut.

    Args:
        row_format, images_root: see `open_rows`.

    Raises:
        DataError, MissingFileError: as `open_rows`; or no row falls into the part, or one has no value to cut by.
    """
    rows, part = open_rows(source, row_format, images_root), source.part
    if part is None:
        return rows
    count = len(rows) if source.limit is None else min(source.limit, len(rows))
    documents = _documents(rows, count, _by(source, part, row_format), source.path)
    chosen = array("q", (row for row, key in enumerate(documents) if _is_eval(key, part) == (part.take == "eval")))
    if not chosen:
        told = f"none of the {len(set(documents)):,} documents in its {count:,} rows falls into the part to"
        raise DataError(f"{source.path}: {told} {part.take} (data.split.eval {part.eval:g}); change it or its seed")
    return PartRows(rows, chosen, f"{part.eval} {part.by} {part.seed} {part.take} {count}")


class PartRows(Rows):
    """Some rows of a source.

    Args:
        rows: all of them.
        chosen: numbers of the rows, ascending.
        rule: how they were chosen, for the fingerprint.
    """

    def __init__(self, rows: Rows, chosen: "array[int]", rule: str):
        self.name, self.folder, self.notes = rows.name, rows.folder, rows.notes
        self._rows, self._chosen, self._rule = rows, chosen, rule

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._rows[self._chosen[index]]

    def origin(self, index: int) -> Origin:
        return self._rows.origin(self._chosen[index])

    def scan(self, start: int, stop: int) -> Iterator[Mapping[str, Any] | BadRow]:
        if start >= stop:
            return
        # Read through what is between them: a file is opened once.
        first, wanted = self._chosen[start], set(self._chosen[start:stop])
        for number, row in enumerate(self._rows.scan(first, self._chosen[stop - 1] + 1), start=first):
            if number in wanted:
                yield row

    def fingerprint(self) -> str:
        return sha256(f"{self._rows.fingerprint()} {self._rule}".encode()).hexdigest()


class _Column:
    """Keys of a row by the value of a column."""

    def __init__(self, column: str):
        self.column = column

    def keys(self, row: Mapping[str, Any], rows: Rows, number: int) -> list[bytes]:
        if row.get(self.column) is None:
            raise DataError(f"{rows.origin(number)}: has no {self.column}, by which data.split cuts")
        return [_digest(json.dumps(row[self.column], default=str, sort_keys=True).encode())]


class _Images:
    """Keys of a row by its images: paths, or the content of those that are in the data."""

    def __init__(self, row_format: str, columns: Mapping[str, str]):
        self.columns = {"image": "image", **columns}
        # Whether `<image>` is a place or text, the row itself says here: its images are the same either way.
        self.row_formats = [
            RowFormat(row_format, columns, text_places=text_places)
            for text_places in (True, False)
            if "image" not in COLUMNS[row_format]
        ]

    def keys(self, row: Mapping[str, Any], rows: Rows, number: int) -> list[bytes]:
        try:
            images = self._images(row)
            if any(not isinstance(image, str) for image in images):  # a scan has placeholders for their bytes
                images = self._images(rows[number])
        except (BadField, BadRow):  # told when the row is read
            images = []
        if not images:
            return [_digest(json.dumps(row, default=str, sort_keys=True).encode())]
        return [_image_key(image) for image in images]

    def _images(self, row: Mapping[str, Any]) -> list[Any]:
        if not self.row_formats:
            return fields.images(row, column_of_images(row, self.columns))
        for row_format in self.row_formats[:-1]:
            try:
                return _images_of(row_format, row)
            except BadField:
                continue
        return _images_of(self.row_formats[-1], row)


def _images_of(row_format: RowFormat, row: Mapping[str, Any]) -> list[Any]:
    return [
        image
        for conversation in row_format.conversations(row, lambda _: (1 << 20, 1 << 20))
        for image in image_sources(conversation)
    ]


def _by(source: CutSource, part: Part, row_format: str) -> _Column | _Images:
    return _Column(part.by) if part.by != "image" else _Images(row_format, source.columns or {})


def _image_key(image: Any) -> bytes:
    if isinstance(image, Mapping):
        image = image["bytes"]
    if isinstance(image, bytes):
        return _digest(image)
    # The pages of a file are one document.
    path = _PAGE.sub(r"\1", image)
    return _digest(os.path.normpath(path.replace("\\", "/")).encode(errors="surrogatepass"))


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _documents(rows: Rows, count: int, by: _Column | _Images, name: str) -> list[bytes]:
    """The document of each row: the smallest of the keys that its rows have."""
    parents: dict[bytes, bytes] = {}

    def root(key: bytes) -> bytes:
        while (above := parents.setdefault(key, key)) != key:
            parents[key] = parents[above]
            key = above
        return key

    firsts: list[bytes] = []
    with RowProgress(f"cutting {name}", count) as progress:
        for number, row in enumerate(rows.scan(0, count)):
            # Of a row that cannot be read only its place is known.
            keys = [_digest(str(row).encode())] if isinstance(row, BadRow) else by.keys(row, rows, number)
            firsts.append(keys[0])
            roots = sorted({root(key) for key in keys})
            for key in roots[1:]:
                parents[key] = roots[0]
            progress.add(1)
    return [root(key) for key in firsts]


def _is_eval(document: bytes, part: Part) -> bool:
    drawn = int.from_bytes(blake2b(document, digest_size=8, key=str(part.seed).encode()).digest(), "big")
    return drawn < part.eval * 2**64
