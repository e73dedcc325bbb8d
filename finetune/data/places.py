"""The places of a run's rows in its order: a row that is taken out later leaves its place empty.

The order of an epoch is drawn over the samples that were there when the run began. A run that is resumed after a bad
row was mended or taken out would draw another one, so the run folder has a digest of each sample: rows are found again
by it, whatever moved. A place whose row is gone stays empty. Any other change is refused: a row that became another,
came in, or moved.
"""

import zipfile
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.checks.checked import Checked
from finetune.data.images.image_files import file_size, image_paths
from finetune.data.sample import BadRow, Origin, Sample
from finetune.data.samples import LOOKED_AT, Samples
from finetune.errors import UserError
from finetune.files.path_errors import path_errors

SHOWN = 5  # changes that are named


class Gone(BadRow):
    """A sample that was there when the run began and is not any more."""


@dataclass(frozen=True)
class Places:
    """The samples of a part of the data as they were at one time.

    Attributes:
        fingerprint: see `Samples.fingerprint`.
        digests: (samples,) uint64, see `row_digest`; 0 for a row that cannot be used.
        kept: (samples,) bool, whether it is trained on.
        ends: (sources,) int64, samples of the sources up to and with each.
        looked_at: (some,) int64, samples whose image files were looked at.
        sizes: (some,) uint64, digest of the sizes of these files.
    """

    fingerprint: str
    digests: np.ndarray
    kept: np.ndarray
    ends: np.ndarray
    looked_at: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class Aligned:
    """Where the samples of then are now.

    Attributes:
        now_of: (samples then,) int64, the present number of each; -1 where it is gone or cannot be used now.
        gone: samples that were trained on and are not there now, or cannot be used.
        mended: numbers of then, of the samples that were left out while the run worked and are others now.
        waiting: samples that were left out when the run began, and could be used now.
        changes: what else has changed, a line each: the run does not go on with that.
    """

    now_of: np.ndarray
    gone: int
    mended: list[int]
    waiting: int
    changes: list[str]

    def notes(self, name: str) -> Iterator[str]:
        """What to say about a run that goes on."""
        if self.gone:
            yield f"{_rows(self.gone)} of the {name} data gone or unusable since the run began: its place stays empty"
        if self.mended:
            yield f"{_rows(len(self.mended))} of the {name} data mended since it was left out: it is used from here on"
        if self.waiting:
            yield f"{_rows(self.waiting)} of the {name} data left out when the run began is usable now: it stays out"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def places_of(samples: Samples, checked: Checked, fingerprint: str) -> Places:
    """The places of samples that were just checked."""
    kept = np.zeros(len(samples), bool)
    kept[checked.kept] = True
    step = max(1, len(checked.kept) // LOOKED_AT)
    looked_at = checked.kept[::step]
    return Places(
        fingerprint,
        checked.digests,
        kept,
        np.array([part.stop for part in samples.ranges], np.int64),
        looked_at,
        _sizes(samples, looked_at.tolist()),
    )


def align(then: Places, now: Places, samples: Samples, left_out: Collection[int]) -> Aligned:
    """Find the samples of then among those of now.

    Args:
        samples: of now.
        left_out: numbers of then, of the samples that were left out while the run worked.
    """
    free = ~then.kept
    free[[number for number in left_out if number < len(free)]] = True
    changes: list[str] = []
    if now.fingerprint == then.fingerprint and len(now.digests) == len(then.digests):
        now_of = np.arange(len(then.digests))
        mended: list[int] = []
    elif len(now.ends) != len(then.ends):
        changes.append(f"it has {len(now.ends)} sources, and had {len(then.ends)}")
        now_of, mended = np.full(len(then.digests), -1, np.int64), []
    else:
        now_of, changed, added = _match_sources(then, now, free)
        mended = [i for i, _ in changed if free[i] and then.kept[i]]
        others = [f"{samples_origin(samples, j)} is not the row that it was" for i, j in changed if not free[i]]
        others += [f"{samples_origin(samples, j)} was not there, or not at this place" for j in added]
        changes += others
        there = now_of[then.looked_at]
        taken = np.flatnonzero((there >= 0) & (now.digests[there] != 0))
        sizes = _sizes(samples, there[taken].tolist())
        for place in taken[sizes != then.sizes[taken]].tolist():
            if free[number := int(then.looked_at[place])]:
                mended += [number] if number not in mended else []
            else:
                changes.append(f"{samples_origin(samples, int(there[place]))} has another image file than it had")
    usable = now_of >= 0
    usable[usable] = now.kept[now_of[usable]]
    waiting = int((usable & ~then.kept).sum())
    now_of = np.where(usable, now_of, -1)
    if len(changes) > SHOWN:
        changes = [*changes[:SHOWN], f"... and {len(changes) - SHOWN:,} more changes"]
    return Aligned(now_of, int((then.kept & ~usable).sum()), mended, waiting, changes)


def samples_origin(samples: Samples, number: int) -> str:
    """File and row of a sample, as well as they are known."""
    try:
        return str(samples[number].origin)
    except BadRow as error:
        return str(error.origin)


def _match_sources(then: Places, now: Places, free: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]], list[int]]:
    """As `_match`, each source by itself: rows of two that read the same may have other images."""
    now_of = np.full(len(then.digests), -1, np.int64)
    changed: list[tuple[int, int]] = []
    added: list[int] = []
    start = first = 0
    for stop, last in zip(then.ends.tolist(), now.ends.tolist(), strict=True):
        found, others, new = _match(
            then.digests[start:stop], now.digests[first:last], free[start:stop], now.kept[first:last]
        )
        now_of[start:stop] = np.where(found < 0, -1, found + first)
        changed += [(was + start, number + first) for was, number in others]
        added += [number + first for number in new]
        start, first = stop, last
    return now_of, changed, added


def _match(
    then: np.ndarray, now: np.ndarray, free: np.ndarray, kept: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, int]], list[int]]:
    """Present number of each sample of then, -1 where there is none; (then, now) of those that are others; those that
    are new and would be trained on.

    Samples keep their order. One that is unknown takes the place of the next one that is nowhere to be found.
    """
    if len(then) == len(now) and not ((then != now) & ~free & (now != 0)).any():
        others = np.flatnonzero((then != now) & (now != 0))
        return np.arange(len(then)), [(number, number) for number in others.tolist()], []
    now_of = np.full(len(then), -1, np.int64)
    shorter = min(len(then), len(now))
    differ = np.flatnonzero(then[:shorter] != now[:shorter])
    start = int(differ[0]) if len(differ) else shorter
    differ = np.flatnonzero(then[::-1][: shorter - start] != now[::-1][: shorter - start])
    tail = int(differ[0]) if len(differ) else shorter - start
    now_of[:start] = np.arange(start)
    if tail:
        now_of[len(then) - tail :] = np.arange(len(now) - tail, len(now))
    left = then[start : len(then) - tail].tolist()
    found = now[start : len(now) - tail].tolist()
    positions: dict[int, array[int]] = {}
    for place, digest in enumerate(left):
        if digest:
            positions.setdefault(digest, array("q")).append(place)
    for places in positions.values():
        places.reverse()  # the next one is the last
    ahead = Counter(found)
    changed: list[tuple[int, int]] = []
    added: list[int] = []
    at = 0
    for number, digest in enumerate(found):
        ahead[digest] -= 1
        places = positions.get(digest, array("q"))
        while places and places[-1] < at:
            places.pop()
        if places:
            at = places.pop() + 1
            now_of[start + at - 1] = start + number
            continue
        if at < len(left) and not ahead[left[at]]:
            now_of[start + at] = start + number
            if digest:
                changed.append((start + at, start + number))
            at += 1
        elif kept[start + number]:
            added.append(start + number)
    return now_of, changed, added


def _sizes(samples: Samples, numbers: Sequence[int]) -> np.ndarray:
    """For each sample a digest of the sizes of its image files."""
    found = np.zeros(len(numbers), np.uint64)
    for place, number in enumerate(numbers):
        for sample in samples.scan(number, number + 1):
            if isinstance(sample, Sample):
                sizes = [file_size(source) for source in image_paths(sample)]
                found[place] = int.from_bytes(blake2b(repr(sizes).encode(), digest_size=8).digest(), "little")
    return found


class PlacedSamples(Samples):
    """The samples of a run that goes on, by the numbers that they had when it began; those that are gone raise `Gone`.

    Args:
        samples: as they are now.
        now_of: see `Aligned`.
        ends: see `Places`.
    """

    def __init__(self, samples: Samples, now_of: np.ndarray, ends: np.ndarray):
        self._samples, self._now_of = samples, now_of
        starts = [0, *ends.tolist()[:-1]]
        self.ranges = [range(start, end) for start, end in zip(starts, ends.tolist(), strict=True)]
        self.weights = samples.weights

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} samples, no index {index}")
        number = int(self._now_of[index])
        if number < 0:
            raise Gone(Origin("the run's data", index % len(self) + 1), "row", "is gone since the run began")
        return self._samples[number]

    def scan(self, start: int, stop: int) -> Iterator[Sample | BadRow]:
        for index in range(start, stop):
            number = int(self._now_of[index])
            if number < 0:
                yield Gone(Origin("the run's data", index + 1), "row", "is gone since the run began")
            else:
                yield from self._samples.scan(number, number + 1)

    @property
    def notes(self) -> list[str]:
        return self._samples.notes

    def fingerprint(self, *, images: bool = True) -> str:
        return self._samples.fingerprint(images=images)


def as_they_were(samples: Samples, checked: Checked, then: Places, aligned: Aligned) -> tuple[Samples, Checked]:
    """The samples and what was found in them, by the numbers of then; an empty place has one token and no image.

    Samples that were left out when the run began stay out.
    """
    kept = np.flatnonzero(then.kept)
    is_same = len(then.kept) == len(samples) and np.array_equal(kept, checked.kept)
    if is_same and np.array_equal(aligned.now_of[kept], kept):
        return samples, checked
    numbers = aligned.now_of[kept]
    there = numbers >= 0
    at = np.searchsorted(checked.kept, numbers[there])

    def placed(values: np.ndarray, empty: int) -> np.ndarray:
        result = np.full(len(kept), empty, np.int64)
        result[there] = values[at]
        return result

    return PlacedSamples(samples, aligned.now_of, then.ends), replace(
        checked,
        kept=kept,
        lengths=placed(checked.lengths, 1),
        images=placed(checked.images, 0),
        supervised=placed(checked.supervised, 0),
        source=np.searchsorted(then.ends, kept, side="right"),
        refused=max(len(then.kept) - len(kept) - len(checked.dropped_long), 0),
    )


def save_places(file: Path, parts: dict[str, Places]) -> None:
    """Write the places of all parts of the data: 8 bytes a sample, and a bit."""
    arrays: dict[str, Any] = {}
    for name, places in parts.items():
        arrays |= {
            f"{name}.fingerprint": np.frombuffer(places.fingerprint.encode(), np.uint8),
            f"{name}.digests": places.digests,
            f"{name}.kept": np.packbits(places.kept),
            f"{name}.ends": places.ends,
            f"{name}.looked_at": places.looked_at,
            f"{name}.sizes": places.sizes,
        }
    with file.open("wb") as opened:
        np.savez(opened, **arrays)


def load_places(file: Path) -> dict[str, Places]:
    """The places that `save_places` wrote.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    with path_errors(file, "read", "Restore it, or start a new run"):
        try:
            with np.load(file, allow_pickle=False) as arrays:
                names = dict.fromkeys(name.rpartition(".")[0] for name in arrays.files)
                return {name: _loaded(arrays, name) for name in names}
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{file} is damaged ({error}): restore it, or start a new run") from None


def _loaded(arrays: Any, name: str) -> Places:
    digests = arrays[f"{name}.digests"]
    return Places(
        arrays[f"{name}.fingerprint"].tobytes().decode(),
        digests,
        np.unpackbits(arrays[f"{name}.kept"], count=len(digests)).astype(bool),
        arrays[f"{name}.ends"],
        arrays[f"{name}.looked_at"],
        arrays[f"{name}.sizes"],
    )
