"""The rows of several files as those of one source: `path: data/*.jsonl`."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

from finetune.data.sample import BadRow, Origin
from finetune.data.sources.rows import Rows

WILDCARDS = "*?["


def files_of(pattern: str) -> list[Path]:
    """The files that a pattern names, in the order of their names; `**` stands for folders of any depth."""
    names = sorted(glob(pattern, recursive=True))  # noqa: PTH207 (a pattern may be absolute)
    return [path for path in map(Path, names) if path.is_file()]


def folder_of(pattern: str) -> Path:
    """The folder that is the same for all files: what stands before the first wildcard."""
    folder = Path()
    for part in Path(pattern).parts[:-1]:
        if any(mark in part for mark in WILDCARDS):
            break
        folder /= part
    return folder.absolute()


class SeveralFilesRows(Rows):
    """The rows of each file after those of the file before; each says its own file as its origin.

    Args:
        parts: the rows of the files.
        name, folder: see `Rows`.
    """

    def __init__(self, parts: Sequence[Rows], name: str, folder: Path):
        self.name, self.folder = name, folder
        self._parts = parts
        self.notes = [f"{part.name}: {note}" for part in parts for note in part.notes]
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        part, place = self._find(index)
        return part[place]

    def origin(self, index: int) -> Origin:
        part, place = self._find(index)
        return part.origin(place)

    def scan(self, start: int, stop: int) -> Iterator[Mapping[str, Any] | BadRow]:
        for part, end in zip(self._parts, self._ends, strict=True):
            begin = end - len(part)
            if max(start, begin) < min(stop, end):
                yield from part.scan(max(start, begin) - begin, min(stop, end) - begin)

    def fingerprint(self) -> str:
        return sha256(" ".join(part.fingerprint() for part in self._parts).encode()).hexdigest()

    def _find(self, index: int) -> tuple[Rows, int]:
        index = range(len(self))[index]
        number = bisect_right(self._ends, index)
        return self._parts[number], index - (self._ends[number] - len(self._parts[number]))
