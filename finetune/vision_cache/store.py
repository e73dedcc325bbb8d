"""Image features in append-only files of equal records, found by key and verified by checksum when they are read.

    NAME.features    records, each the bytes of an image's (n_queries, hidden)
    NAME.journal     an entry of 40 bytes for each record, and for each further handle of an image that has one

The two files are a segment. A segment has one writer, which appends a record before its journal entry: a process that
is killed leaves at most bytes without an entry, and readers need no lock. Every process that writes (of one run or of
several) has its own segment; `refresh` reads what the others have added. Nothing is fsynced: what a power failure
destroys fails its checksum.
"""

import contextlib
import os
import secrets
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from finetune.files.atomic_writes import make_folder
from finetune.files.path_errors import path_errors
from finetune.files.tensor_files import tensor_bytes

KEY_BYTES = 16
FEATURES, JOURNAL = ".features", ".journal"
_KEY = f"V{KEY_BYTES}"
_LINE = np.dtype([("handle", _KEY), ("content", _KEY), ("slot", "<u4"), ("checksum", "<u4")])
_ELSEWHERE = 2**32 - 1
"""The slot of an entry that only maps a handle to a content."""

REMEDY = "Free space there or mend its permissions, or set HF_HOME to move the cache"


class Damaged(ValueError):
    """A record's bytes are not those that were written."""


class Place(NamedTuple):
    """Where a record is: its segment's name, its number there, and the checksum of its bytes and content key."""

    segment: str
    slot: int
    checksum: int


@dataclass
class _Segment:
    """A segment, as far as this process has read it.

    Attributes:
        file: of its records.
        journal: its journal; None for a segment in memory.
        read: bytes of the journal that were read.
    """

    file: str
    journal: Path | None
    read: int = 0


@dataclass(frozen=True)
class Record:
    """The form of every record: the features of one image, (n_queries, hidden), in one dtype."""

    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass
class FeatureStore:
    """Maps `content`, the key of what was encoded, to features, and `handle`, a cheaper key, to `content`.

    Keys have `KEY_BYTES` bytes. Pickles to other processes, which can then read.

    Args:
        folder: of the segments; created with the first record. None keeps segments in this machine's memory, for as
            long as this process lives.
        record: the form of every record.

    Attributes:
        places: content -> where its features are.
        handles: handle -> content, whose features may be missing or damaged.
    """

    folder: Path | None
    record: Record
    places: dict[bytes, Place] = field(default_factory=dict)
    handles: dict[bytes, bytes] = field(default_factory=dict)
    _segments: dict[str, _Segment] = field(default_factory=dict)
    _own: "_Writer | None" = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_own": None}

    def refresh(self) -> None:
        """Read what other processes have added. Of two records of one content, the one in the newer segment counts."""
        if self.folder is None:
            return
        with path_errors(self.folder, "read the vision cache in", REMEDY):
            if self.folder.is_dir():
                self._refresh(self.folder)

    def _refresh(self, folder: Path) -> None:
        for journal in sorted(folder.glob(f"*{JOURNAL}")):
            name = journal.name.removesuffix(JOURNAL)
            if self._own is not None and name == self._own.name:
                continue
            if name not in self._segments:
                self._segments[name] = _Segment(str(folder / f"{name}{FEATURES}"), journal)
            segment = self._segments[name]
            if journal.stat().st_size - segment.read < _LINE.itemsize:
                continue
            with journal.open("rb") as file:
                file.seek(segment.read)
                lines = file.read()
            lines = lines[: len(lines) - len(lines) % _LINE.itemsize]
            segment.read += len(lines)
            self._learn(name, lines)

    def add(self, entries: Sequence[tuple[bytes, bytes]], features: torch.Tensor) -> None:
        """Append features.

        Args:
            entries: (handle, content) of each.
            features: (entries, n_queries, hidden), on any device.

        Raises:
            PathError: the disk is full or fails; earlier records are unchanged.
        """
        assert features.shape[1:] == self.record.shape and features.dtype == self.record.dtype
        data, size = tensor_bytes(features), self.record.nbytes
        with self._writing() as writer:
            lines = np.zeros(len(entries), _LINE)
            for number, (handle, content) in enumerate(entries):
                checksum = _checksum(content, data[number * size : (number + 1) * size])
                lines[number] = (handle, content, writer.records + number, checksum)
            writer.write_records(data, len(entries))
            writer.write_lines(lines)
        self._learn(writer.name, lines.tobytes())

    def name(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Add (handle, content) of images whose features are stored under another handle.

        Raises:
            PathError: the disk is full or fails.
        """
        new = [(handle, content, _ELSEWHERE, 0) for handle, content in entries]
        if new:
            lines = np.array(new, _LINE)
            with self._writing() as writer:
                writer.write_lines(lines)
            self._learn(writer.name, lines.tobytes())

    def has(self, handle: bytes) -> bool:
        """Whether there is a record for a handle's image; it may be damaged."""
        return self.handles.get(handle) in self.places

    def read(self, content: bytes) -> torch.Tensor:
        """Read features, (n_queries, hidden), exactly as they were written.

        Raises:
            KeyError: there is no record.
            Damaged: the record is not as it was written, or its file is cut off or missing.
        """
        place, size = self.places[content], self.record.nbytes
        data, file = torch.empty(size, dtype=torch.uint8), self._segments[place.segment].file
        buffer = data.numpy().data
        try:
            # Opened for each read: forked loader workers would share the position in an open file.
            with open(file, "rb") as opened:  # noqa: PTH123
                opened.seek(place.slot * size)
                found = opened.readinto(buffer)
        except OSError as error:
            raise Damaged(f"{file} cannot be read ({error.strerror})") from error
        if found < size or _checksum(content, buffer) != place.checksum:
            raise Damaged(f"{file}, record {place.slot} is not as it was written")
        return data.view(self.record.dtype).view(self.record.shape)

    def forget(self, content: bytes) -> None:
        """Drop a record, such as a damaged one, from `places`; its bytes stay in the file."""
        self.places.pop(content, None)

    def keep_only(self, handles: Iterable[bytes]) -> None:
        """Drop all other handles, and contents that none of these has, so that the store pickles small."""
        self.handles = {handle: self.handles[handle] for handle in handles if handle in self.handles}
        contents = set(self.handles.values())
        self.places = {content: place for content, place in self.places.items() if content in contents}

    def own_segment(self) -> tuple[str, str, bytes] | None:
        """Name, file and journal of this process's segment in memory, for `adopt` in another; None if it has none."""
        return None if self._own is None else (self._own.name, self._own.file, b"".join(self._own.lines))

    def adopt(self, name: str, file: str, lines: bytes) -> None:
        """Add a segment in the memory of another process of this machine, which must stay alive."""
        if self._own is None or name != self._own.name:
            self._segments[name] = _Segment(file, None)
            self._learn(name, lines)

    def _learn(self, name: str, lines: bytes) -> None:
        known = Path(self._segments[name].file)
        try:
            records = known.stat().st_size // self.record.nbytes
        except OSError:
            records = 0
        for handle, content, slot, checksum in np.frombuffer(lines, _LINE).tolist():
            self.handles[handle] = content
            if slot < records:
                self.places[content] = Place(name, slot, checksum)

    @contextlib.contextmanager
    def _writing(self) -> Iterator["_Writer"]:
        """This process's segment, begun if need be."""
        errors = (
            contextlib.nullcontext()
            if self.folder is None
            else path_errors(self.folder, "write the vision cache to", REMEDY)
        )
        with errors:
            yield self._writer()

    def _writer(self) -> "_Writer":
        if self._own is None:
            self._own = _Writer.in_memory() if self.folder is None else _Writer.in_folder(self.folder)
            journal = None if self.folder is None else self.folder / f"{self._own.name}{JOURNAL}"
            self._segments[self._own.name] = _Segment(self._own.file, journal)
        return self._own


class _Writer:
    """The segment that this process writes.

    Attributes:
        records: written so far.
        lines: the journal of a segment in memory.
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
        # Names sort by age.
        name = f"{time.time_ns():020}-{os.getpid()}-{secrets.token_hex(4)}"
        features, journal = (folder / f"{name}{ending}" for ending in (FEATURES, JOURNAL))
        return cls(name, str(features), features.open("xb", buffering=0), journal.open("xb", buffering=0))

    @classmethod
    def in_memory(cls) -> "_Writer":
        descriptor = os.memfd_create("vision-features")
        # Other processes of this machine, children included, can open this path while this process lives.
        file = f"/proc/{os.getpid()}/fd/{descriptor}"
        return cls(f"{os.getpid()}-{secrets.token_hex(4)}", file, FileIO(descriptor, "wb"), None)

    def write_records(self, data: memoryview, count: int) -> None:
        _write(self._features, data, self.records * (len(data) // count))
        self.records += count

    def write_lines(self, lines: np.ndarray) -> None:
        data = lines.tobytes()
        if self._journal is None:
            self.lines.append(data)
            return
        _write(self._journal, memoryview(data), self._journal_bytes)
        self._journal_bytes += len(data)


def _write(file: FileIO, data: memoryview, place: int) -> None:
    """Write all bytes at a position; what an earlier, failed write left there is overwritten."""
    file.seek(place)
    while data:
        data = data[file.write(data) :]


def _checksum(content: bytes, data: memoryview) -> int:
    """The checksum of a record and its content key: the record of another image fails it too."""
    return zlib.crc32(data, zlib.crc32(content))
