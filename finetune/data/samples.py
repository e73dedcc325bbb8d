"""The samples of several sources by number, made on access."""

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from finetune.data.annotated_boxes import in_pixels
from finetune.data.formats.document_fields import WantedFields
from finetune.data.formats.grounding import NO_OBJECT
from finetune.data.formats.row_format import RowFormat
from finetune.data.images.image_files import absolute, file_size, image_paths, upright_size
from finetune.data.images.pages import Pages
from finetune.data.sample import BadField, BadRow, DataError, Origin, Sample
from finetune.data.sources.rows import Rows
from finetune.data.sources.sources import FieldsSource, RowSource
from finetune.data.split import Part, read_part
from qwenvl.images.images import ImageAccess

LOOKED_AT = 1000
"""Samples whose image files count in a fingerprint; at most twice this many."""


class SampleSource(RowSource, Protocol):
    """A source of samples, or the part of it to read."""

    @property
    def part(self) -> Part | None: ...


class Samples:
    """The samples of several sources, one source after the other: `samples[31]` reads and converts one row, and opens
    no image.

    Pickles to loader workers as paths and row offsets, without rows. Where a row may make several samples (questions,
    phrases or captions in a list), the constructor reads the text of all rows of the source once to count them.

    Args:
        sources: in this order.
        images_root: folder that relative image paths start at and all paths must stay in; None is the folder of each
            source's own file.
        access: everything else that images may reach, no URLs by default; its own root counts as `images_root`.
        no_object: the reply of rows of format `grounding` that have no box.
        pages: how files of several pages become several images; None refuses them unless a page is named.
        ignore: columns that are not read, see `RowFormat`.
        text_places: whether `<image>` in a text may be the place of an image, see `RowFormat`.
        rows: of each source, where they are open already.

    Attributes:
        ranges: for each source the indices of its samples.
        weights: for each source its weight.

    Raises:
        MissingFileError: a source's file does not exist.
        DataError: a source that cannot be read, holds no rows, or whose format, columns or prompt are wrong.
    """

    def __init__(
        self,
        sources: Sequence[SampleSource],
        *,
        images_root: str | Path | None = None,
        access: ImageAccess | None = None,
        no_object: str = NO_OBJECT,
        pages: Pages | None = None,
        ignore: Collection[str] = (),
        text_places: bool = True,
        rows: Sequence[Rows] | None = None,
    ):
        access = ImageAccess() if access is None else access
        access = access if pages is None else replace(access, dpi=pages.dpi)
        root = images_root if images_root is not None else access.root
        opened: Sequence[Rows | None] = [None] * len(sources) if rows is None else rows
        self._parts = [
            _Part.read(source, given, root, access, no_object, pages, frozenset(ignore), text_places)
            for source, given in zip(sources, opened, strict=True)
        ]
        ends = list(accumulate(len(part) for part in self._parts))
        self.ranges = [range(end - len(part), end) for end, part in zip(ends, self._parts, strict=True)]
        self.weights = [1.0 if source.weight is None else float(source.weight) for source in sources]

    def __len__(self) -> int:
        return self.ranges[-1].stop if self.ranges else 0

    def __getitem__(self, index: int) -> Sample:
        """The sample of that index.

        Raises:
            BadRow: its row makes no sample.
            DataError: its file cannot be read.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} samples, no index {index}")
        index %= len(self)
        number = bisect_right([samples.stop for samples in self.ranges], index)
        return self._parts[number].sample(index - self.ranges[number].start)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def scan(self, start: int, stop: int) -> Iterator[Sample | BadRow]:
        """Samples `start` to `stop` in order, for their text: placeholders may replace the bytes of images that a row
        holds. A row that makes no sample comes as its error, once for each index it has."""
        for samples, part in zip(self.ranges, self._parts, strict=True):
            first, last = max(start, samples.start), min(stop, samples.stop)
            if first < last:
                yield from part.scan(first - samples.start, last - samples.start)

    @property
    def notes(self) -> list[str]:
        """What is to be said of the sources as a whole, such as what was left out of them, each with its path."""
        return [f"{part.rows.name}: {note}" for part in self._parts for note in part.rows.notes]

    def fingerprint(self, *, images: bool = True) -> str:
        """Hexadecimal digest of what the samples are made of: the data files, and how their rows are read.

        Text files count by their whole content, Parquet and Arrow files by their sizes and ends, a hub dataset by the
        fingerprint that its library gives it. Images in files of their own count by the sizes in bytes of those of
        some samples, evenly spaced: this finds a folder that was resized or replaced, in a time that does not grow
        with the data (looking at a million files takes minutes on a network disk). Modification times do not count, as
        copies have others. A change of a single image can go unnoticed, but not in data that `finetune prepare` wrote.

        Args:
            images: False leaves image files out.
        """
        identity = [part.identity() for part in self._parts]
        sizes = self._image_sizes() if images else []
        return hashlib.sha256(json.dumps([identity, sizes]).encode()).hexdigest()

    def _image_sizes(self) -> list[int]:
        """Bytes of the image files of some samples, -1 for one that cannot be looked at."""
        sizes = []
        for index in range(0, len(self), max(1, len(self) // LOOKED_AT)):
            for sample in self.scan(index, index + 1):
                sizes += [] if isinstance(sample, BadRow) else [file_size(source) for source in image_paths(sample)]
        return sizes


def wanted_fields(source: FieldsSource) -> WantedFields:
    """What a source of format `fields` asks for.

    Raises:
        DataError: no fields, unknown ones, or prompts that do not fit.
    """
    return WantedFields(tuple(source.fields), source.reply, source.missing, tuple(source.nested), source.prompts)


@dataclass(frozen=True)
class _Part:
    """The samples of one source.

    Attributes:
        rows: of the source.
        row_format: how they are read.
        root: where relative image paths start.
        access: what their images may reach, below `root`.
        count: rows to use.
        ends: for each row the number of samples up to and with it; None where every row is one sample.
        pages: see `Samples`.
    """

    rows: Rows
    row_format: RowFormat
    root: Path
    access: ImageAccess
    count: int
    ends: "array[int] | None"
    pages: Pages | None = None

    @classmethod
    def read(
        cls,
        source: SampleSource,
        opened: Rows | None,
        root: str | Path | None,
        access: ImageAccess,
        no_object: str,
        pages: Pages | None,
        ignore: frozenset[str],
        text_places: bool,
    ) -> "_Part":
        try:
            row_format = RowFormat(
                source.format,
                source.columns or {},
                source.prompt,
                source.box_form,
                no_object,
                wanted_fields(source) if source.format == "fields" else None,
                ignore,
                text_places,
            )
        except DataError as error:
            raise DataError(f"{source.path}: {error}") from None
        rows = read_part(source, row_format.name, root) if opened is None else opened
        count = len(rows) if source.limit is None else min(source.limit, len(rows))
        if count < 1:
            raise DataError(f"{source.path}: holds no rows" if not len(rows) else f"{source.path}: limit is below 1")
        ends = None
        if row_format.counts_rows:
            counts = (1 if isinstance(row, BadRow) else row_format.count(row) for row in rows.scan(0, count))
            ends = array("q", accumulate(counts))
            if ends[-1] == count:
                ends = None
        folder = Path(rows.folder if root is None else root).absolute()
        return cls(rows, row_format, folder, replace(access, root=folder), count, ends, pages)

    def __len__(self) -> int:
        return self.count if self.ends is None else self.ends[-1]

    def sample(self, index: int) -> Sample:
        row, item = self._find(index)
        samples = self._convert(self.rows[row], row)
        if item >= len(samples):
            raise BadRow(self.rows.origin(row), "row", "has fewer samples than it had when the run began")
        return samples[item]

    def scan(self, start: int, stop: int) -> Iterator[Sample | BadRow]:
        row, item = self._find(start)
        last_row, _ = self._find(stop - 1)
        left = stop - start
        for given in self._scan_rows(row, last_row + 1):
            converted = self._try_convert(given, row)
            size = self._size(row)
            outcomes = [converted] * size if isinstance(converted, BadRow) else converted
            taken = outcomes[item : item + left]
            yield from taken
            left -= len(taken)
            row, item = row + 1, 0

    def identity(self) -> dict[str, Any]:
        row_format = self.row_format
        # Data that was known before there was a choice stays the same.
        replies = {} if row_format.no_object == NO_OBJECT else {"no_object": row_format.no_object}
        pages = {} if self.pages is None else {"pages": asdict(self.pages)}
        return {
            **pages,
            **({} if row_format.wanted is None else {"fields": asdict(row_format.wanted)}),
            "rows": self.rows.fingerprint(),
            "used": self.count,
            "format": row_format.name,
            "columns": row_format.known_columns,
            "prompt": row_format.prompt,
            "box_form": row_format.box_form,
            **replies,
            # Only where they are set: earlier runs have neither.
            **({"ignore": sorted(row_format.ignore)} if row_format.ignore else {}),
            **({} if row_format.text_places else {"text_places": False}),
        }

    def _find(self, index: int) -> tuple[int, int]:
        """The row of a sample, and which of the row's samples it is."""
        if self.ends is None:
            return index, 0
        row = bisect_right(self.ends, index)
        return row, index - (self.ends[row - 1] if row else 0)

    def _size(self, row: int) -> int:
        return 1 if self.ends is None else self.ends[row] - (self.ends[row - 1] if row else 0)

    def _scan_rows(self, start: int, stop: int) -> Iterator[Mapping[str, Any] | BadRow]:
        # Placeholders have no image size and no pages: where these are read, whole rows are read.
        whole = self.row_format.reads_image_size or self.pages is not None
        return Rows.scan(self.rows, start, stop) if whole else self.rows.scan(start, stop)

    def _try_convert(self, given: Mapping[str, Any] | BadRow, row: int) -> list[Sample] | BadRow:
        if isinstance(given, BadRow):
            return given
        try:
            return self._convert(given, row)
        except BadRow as error:
            return error

    def _convert(self, given: Mapping[str, Any], row: int) -> list[Sample]:
        origin = self.rows.origin(row)
        try:
            # First, as it takes out what an annotation export says beside the columns.
            given, image_size = in_pixels(given, self._image_size)
            unread = self.row_format.unread(given)
            conversations = self.row_format.conversations(given, image_size, row)
            return [self._sample(conversation, origin, unread) for conversation in conversations]
        except BadField as error:
            raise BadRow(origin, error.field, error.reason) from None

    def _sample(self, conversation: Sequence[Mapping[str, Any]], origin: Origin, unread: tuple[str, ...]) -> Sample:
        messages = tuple(map(self._with_absolute_paths, conversation))
        if self.pages is None:
            return Sample(messages, origin, self.access, unread=unread)
        expanded = self.pages.expand(messages, self.access)
        return Sample(expanded.messages, origin, self.access, expanded.left_out, unread, expanded.more)

    def _image_size(self, source: Any) -> tuple[int, int]:
        return upright_size(absolute(source, self.root), self.access)

    def _with_absolute_paths(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        if isinstance(message["content"], str):
            return message
        parts = [
            {**part, "image": absolute(part["image"], self.root)} if part["type"] == "image" else part
            for part in message["content"]
        ]
        return {**message, "content": parts}
