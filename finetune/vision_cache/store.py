"""Image features in files: records of one size, which are appended, found by what they are of, and checked as read.

    NAME.features    record after record, each the bytes of an image's (n_queries, hidden)
    NAME.journal     a line of 40 bytes for each record, and for each further name of an image that has one

Both together are a segment. It has one writer, which writes a record first and its line after it, so that nothing is
ever half there: a process that is killed leaves at most bytes that no line speaks of, and a reader needs no lock. Of
several processes that write (runs, or the processes of one run) each has a segment of its own, and `refresh` tells it
what the others have added. Nothing is brought to the disk by force: what a power failure takes shows in a checksum.
"""

import os
import secrets
import time
import weakref
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from io import FileIO
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from finetune.files.atomic_writes import make_folder
from finetune.files.tensor_files import tensor_bytes

KEY_BYTES = 16
FEATURES, JOURNAL = ".features", ".journal"
_KEY = f"V{KEY_BYTES}"
_LINE = np.dtype([("handle", _KEY), ("content", _KEY), ("slot", "<u4"), ("checksum", "<u4")])
_ELSEWHERE = 2**32 - 1
"""The slot of a line that only says that a handle's image has this content."""


class Damaged(ValueError):
    """A record whose bytes are not those that were written."""


class Place(NamedTuple):
    """Where a record is: a segment's name, which record of it, and the checksum of its bytes and its content's key."""

    segment: str
    slot: int
    checksum: int


@dataclass
class _Segment:
    """A segment as far as it was read.

    Attributes: `file` of its records; bytes of its `journal` that were `read`, None where it has none on disk.
    """

    file: str
    journal: Path | None
    read: int = 0


@dataclass(frozen=True)
class Record:
    """What every record is: the features of one image, (n_queries, hidden), in one type."""

    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass
class FeatureStore:
    """Features by the key of what was encoded (`content`), and contents by a name that is cheaper to tell (`handle`).

    Keys are `KEY_BYTES` long. Pickles to other processes, which can then read.

    Args:
        folder: of the segments; made with the first record. None keeps them in the memory of this machine, for as long
            as this process lives.
        record: of every record.

    Attributes:
        places: content -> where its features are.
        handles: handle -> content. The features of a content that is named here may be gone, or damaged.
    """

    folder: Path | None
    record: Record
    places: dict[bytes, Place] = field(default_factory=dict)
    handles: dict[bytes, bytes] = field(default_factory=dict)
    _segments: dict[str, _Segment] = field(default_factory=dict)
    _own: "_Writer | None" = field(default=None, repr=False)

    def __getstate__(self):
        return {**self.__dict__, "_own": None}

    def refresh(self):
        """Learn of what others have added. Of two records of one content the one in the newer segment counts."""
        if self.folder is None or not self.folder.is_dir():
            return
        for journal in sorted(self.folder.glob(f"*{JOURNAL}")):
            name = journal.name.removesuffix(JOURNAL)
            if self._own is not None and name == self._own.name:
                continue
            if name not in self._segments:
                self._segments[name] = _Segment(str(self.folder / f"{name}{FEATURES}"), journal)
            segment = self._segments[name]
            if journal.stat().st_size - segment.read < _LINE.itemsize:
                continue
            with journal.open("rb") as file:
                file.seek(segment.read)
                lines = file.read()
            lines = lines[: len(lines) - len(lines) % _LINE.itemsize]
            segment.read += len(lines)
            self._learn(name, lines)

    def add(self, entries: Sequence[tuple[bytes, bytes]], features: torch.Tensor):
        """Write features.

        Args:
            entries: (handle, content) of each.
            features: (entries, n_queries, hidden), on any device.

        Raises:
            OSError: the disk is full or fails; what was there before is as it was.
        """
        assert features.shape[1:] == self.record.shape and features.dtype == self.record.dtype
        data, size = tensor_bytes(features), self.record.nbytes
        writer = self._writer()
        lines = np.zeros(len(entries), _LINE)
        for number, (handle, content) in enumerate(entries):
            checksum = _checksum(content, data[number * size : (number + 1) * size])
            lines[number] = (handle, content, writer.records + number, checksum)
        writer.write_records(data, len(entries))
        writer.write_lines(lines)
        self._learn(writer.name, lines.tobytes())

    def name(self, entries: Iterable[tuple[bytes, bytes]]):
        """Note (handle, content) of images whose features are there under another handle."""
        new = [(handle, content, _ELSEWHERE, 0) for handle, content in entries]
        if new:
            writer, lines = self._writer(), np.array(new, _LINE)
            writer.write_lines(lines)
            self._learn(writer.name, lines.tobytes())

    def has(self, handle: bytes) -> bool:
        """Whether the features of a handle's image should be there."""
        return self.handles.get(handle) in self.places

    def read(self, content: bytes) -> torch.Tensor:
        """Features, (n_queries, hidden), as they were written.

        Raises:
            KeyError: there are none.
            Damaged: they are not what was written, or their file is cut off or gone.
        """
        place, size = self.places[content], self.record.nbytes
        data, file = torch.empty(size, dtype=torch.uint8), self._segments[place.segment].file
        buffer = memoryview(data.numpy())
        try:
            # Opened anew each time: loader workers that share an open file would move each other's place in it.
            with open(file, "rb") as opened:  # noqa: PTH123
                opened.seek(place.slot * size)
                found = opened.readinto(buffer)
        except OSError as error:
            raise Damaged(f"{file} cannot be read ({error.strerror})") from error
        if found < size or _checksum(content, buffer) != place.checksum:
            raise Damaged(f"{file}, record {place.slot} is not as it was written")
        return data.view(self.record.dtype).view(self.record.shape)

    def forget(self, content: bytes):
        """Take no more notice of a record, one that is damaged say; it stays where it is."""
        self.places.pop(content, None)

    def keep_only(self, handles: Iterable[bytes]):
        """Forget all other handles, and contents that none of these has: what is left is small."""
        self.handles = {handle: self.handles[handle] for handle in handles if handle in self.handles}
        contents = set(self.handles.values())
        self.places = {content: place for content, place in self.places.items() if content in contents}

    def own_segment(self) -> tuple[str, str, bytes] | None:
        """Of a store in memory: name, file and lines of what this process has added, for another's `adopt`."""
        return None if self._own is None else (self._own.name, self._own.file, b"".join(self._own.lines))

    def adopt(self, name: str, file: str, lines: bytes):
        """Take in what another living process of this machine has in memory."""
        if self._own is None or name != self._own.name:
            self._segments[name] = _Segment(file, None)
            self._learn(name, lines)

    def _learn(self, name: str, lines: bytes):
        known = Path(self._segments[name].file)
        try:
            records = known.stat().st_size // self.record.nbytes
        except OSError:
            records = 0
        for handle, content, slot, checksum in np.frombuffer(lines, _LINE).tolist():
            self.handles[handle] = content
            if slot < records:
                self.places[content] = Place(name, slot, checksum)

    def _writer(self) -> "_Writer":
        if self._own is None:
            self._own = _Writer.in_memory() if self.folder is None else _Writer.in_folder(self.folder)
            journal = None if self.folder is None else self.folder / f"{self._own.name}{JOURNAL}"
            self._segments[self._own.name] = _Segment(self._own.file, journal)
        return self._own


class _Writer:
    """The segment that this process writes.

    Attributes: `records` written so far; `lines` of a segment that has no journal on disk.
    """

    def __init__(self, name: str, file: str, features: FileIO, journal: FileIO | None):
        self.name, self.file = name, file
        self.records = 0
        self.lines: list[bytes] = []
        self._features, self._journal, self._journal_bytes = features, journal, 0
        for opened in filter(None, (features, journal)):
            weakref.finalize(self, opened.close)

    @classmethod
    def in_folder(cls, folder: Path) -> "_Writer":
        make_folder(folder)
        # The newest is the last by name.
        name = f"{time.time_ns():020}-{os.getpid()}-{secrets.token_hex(4)}"
        features, journal = (folder / f"{name}{ending}" for ending in (FEATURES, JOURNAL))
        return cls(name, str(features), features.open("xb", buffering=0), journal.open("xb", buffering=0))

    @classmethod
    def in_memory(cls) -> "_Writer":
        descriptor = os.memfd_create("vision-features")
        # Other processes of this machine, this one's children too, find it under this name while this one lives.
        file = f"/proc/{os.getpid()}/fd/{descriptor}"
        return cls(f"{os.getpid()}-{secrets.token_hex(4)}", file, FileIO(descriptor, "wb"), None)

    def write_records(self, data: memoryview, count: int):
        _write(self._features, data, self.records * (len(data) // count))
        self.records += count

    def write_lines(self, lines: np.ndarray):
        data = lines.tobytes()
        if self._journal is None:
            self.lines.append(data)
            return
        _write(self._journal, memoryview(data), self._journal_bytes)
        self._journal_bytes += len(data)


def _write(file: FileIO, data: memoryview, place: int):
    """All of it, at a place: what a write before left half done is written over."""
    file.seek(place)
    while data:
        data = data[file.write(data) :]


def _checksum(content: bytes, data: memoryview) -> int:
    """Of a record and what it is of: the record of another image is as wrong as a damaged one."""
    return zlib.crc32(data, zlib.crc32(content))
