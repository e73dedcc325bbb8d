"""Rows and images that are evaluated on and trained on as well, found by their content.

Of each sample the check keeps a digest of its words, and of each image a digest of its path and the size of its file.
Only images of equal sizes can be the same: of these the content is compared, so that copies under other names are
found, and the reading stays small (at most `MOST_BYTES`; beyond that, images are compared by their paths).
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.images.image_files import file_size, read_encoded
from finetune.data.message_parts import content_parts, image_sources
from finetune.data.sample import BadRow, Sample
from finetune.errors import InputError
from qwenvl.images.image_urls import is_data_uri, is_url

if TYPE_CHECKING:
    from finetune.data.samples import Samples

MOST_BYTES = 1 << 29
"""Image files read for one comparison: seconds from a local disk."""
_UNKNOWN = 0


@dataclass
class Identities:
    """What samples are made of, in their order.

    Attributes:
        words: of each sample, a digest of its roles and texts.
        images: of each sample, how many it has.
        paths: of each image, a digest of its path or data URI; 0 of one inside the data.
        sizes: of each image, bytes; -1 where that is not known.
    """

    words: "array[int]" = field(default_factory=lambda: array("Q"))
    images: "array[int]" = field(default_factory=lambda: array("q"))
    paths: "array[int]" = field(default_factory=lambda: array("Q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, sample: Sample) -> None:
        """Take a sample as `Samples.scan` gives it."""
        words, count = blake2b(digest_size=8), 0
        for message in sample.messages:
            words.update(message["role"].encode())
            for part in content_parts(message):
                if part["type"] == "image":
                    words.update(b"\x00")
                    count += 1
                    self._add_image(part["image"])
                else:
                    words.update(b"\x01" + part["text"].strip().encode(errors="surrogatepass"))
        self.words.append(int.from_bytes(words.digest(), "big"))
        self.images.append(count)

    def extend(self, later: "Identities") -> None:
        for name in ("words", "images", "paths", "sizes"):
            getattr(self, name).extend(getattr(later, name))

    def only(self, stays: np.ndarray) -> "Identities":
        """Those of some of the samples.

        Args:
            stays: (samples,) bool; of any length where nothing was noted.
        """
        if not self.words:
            return self
        counts = np.array(self.images, np.int64)
        of_images = np.repeat(stays, counts)
        return Identities(
            array("Q", np.array(self.words, np.uint64)[stays].tolist()),
            array("q", counts[stays].tolist()),
            array("Q", np.array(self.paths, np.uint64)[of_images].tolist()),
            array("q", np.array(self.sizes, np.int64)[of_images].tolist()),
        )

    def _add_image(self, source: Any) -> None:
        if isinstance(source, str):
            self.paths.append(_number(source.encode(errors="surrogatepass")))
            self.sizes.append(-1 if is_url(source) or is_data_uri(source) else file_size(source))
            return
        data = source["bytes"] if isinstance(source, Mapping) else source
        self.paths.append(_UNKNOWN)
        # A scan has the length in place of the bytes.
        self.sizes.append(int(data) if len(data) < 20 and data.isdigit() else len(data))


@dataclass(frozen=True)
class Overlap:
    """What a part to evaluate on shares with the part to train on.

    Attributes:
        total: samples to evaluate on.
        rows: of these, how many are trained on, words and images; and an example of both sides.
        shown: of these, how many have an image that is trained on; and an example.
        not_compared: images whose content would have had to be read, and was not.
    """

    total: int
    rows: int
    row_example: str
    shown: int
    shown_example: str
    not_compared: int

    def lines(self) -> list[str]:
        """What a user is told; nothing where nothing is shared."""
        told = []
        if self.rows:
            are = "row is a training row" if self.rows == 1 else "rows are training rows"
            told.append(f"{self.rows:,} of {self.total:,} evaluation {are} too, such as {self.row_example}")
        if self.shown > self.rows:
            told.append(
                f"{self.shown:,} of {self.total:,} evaluation rows show an image that is trained on, such as "
                f"{self.shown_example}"
            )
        if told:
            told.append("their scores tell what was learned by heart: data.split: {eval: 0.1} cuts by image")
        if self.not_compared:
            told.append(f"{self.not_compared:,} images of equal sizes were not read to compare them")
        return told


def find_overlap(
    train: "Samples",
    train_kept: np.ndarray,
    trained: Identities,
    evals: "Samples",
    kept: np.ndarray,
    asked: Identities,
) -> Overlap:
    """Compare what is evaluated on with what is trained on.

    Args:
        train, evals: the samples.
        train_kept, kept: (samples,) those of them that are used.
        trained, asked: what these are made of, in the same order.
    """
    left, right = _Side(train, train_kept, trained), _Side(evals, kept, asked)
    same_paths = np.intersect1d(left.paths, right.paths)
    # An image that both sides have under one path is known to be shared: it is read only to find its copies.
    sizes = np.union1d(
        np.intersect1d(left.sizes_without(same_paths), right.sizes_without(())),
        np.intersect1d(left.sizes_without(()), right.sizes_without(same_paths)),
    )
    budget, not_compared = MOST_BYTES, 0
    contents: dict[int, int] = {}
    for side in (right, left):
        budget, missed = side.read_contents(sizes, budget, contents)
        not_compared += missed
    shared = np.intersect1d(left.ids, right.ids)
    shared = shared[shared != _UNKNOWN]
    both = np.intersect1d(left.words, right.words)
    rows_there = {key: row for row, key in reversed(list(left.rows(np.isin(left.words, both))))}
    same = [(row, rows_there[key]) for row, key in right.rows(np.isin(right.words, both)) if key in rows_there]
    shown = right.with_images(shared)
    row_example = shown_example = ""
    if same:
        row_example = f"{right.origin(same[0][0])} ({left.origin(same[0][1])})"
    if len(shown):
        rows = {row for row, _ in same}
        first = next((row for row in shown.tolist() if row not in rows), int(shown[0]))
        images = right.ids[right.span(first)]
        there = int(left.with_images(images[np.isin(images, shared)][:1])[0])
        shown_example = f"{right.origin(first)} ({left.origin(there)})"
    return Overlap(len(right.words), len(same), row_example, len(shown), shown_example, not_compared)


class _Side:
    """One of the two parts; `ids` are what its images are known by: their contents where read, else their paths."""

    def __init__(self, samples: "Samples", kept: np.ndarray, identities: Identities):
        self.samples, self.kept = samples, kept
        self.words = np.array(identities.words, np.uint64)
        self.paths = np.array(identities.paths, np.uint64)
        self.sizes = np.array(identities.sizes, np.int64)
        self.ends = np.cumsum(np.array(identities.images, np.int64))
        self.ids = self.paths.copy()

    def span(self, row: int) -> slice:
        return slice(int(self.ends[row - 1]) if row else 0, int(self.ends[row]))

    def rows(self, chosen: np.ndarray) -> Sequence[tuple[int, tuple[int, ...]]]:
        """The number of each chosen sample and what it is known by, of those whose images are all known."""
        found = []
        for row in np.flatnonzero(chosen).tolist():
            images = self.ids[self.span(row)].tolist()
            if _UNKNOWN not in images:
                found.append((row, (int(self.words[row]), *images)))
        return found

    def with_images(self, ids: np.ndarray) -> np.ndarray:
        """The samples that have one of these images."""
        places = np.flatnonzero(np.isin(self.ids, ids))
        return np.unique(np.searchsorted(self.ends, places, side="right"))

    def origin(self, row: int) -> str:
        return str(self.samples[int(self.kept[row])].origin)

    def sizes_without(self, paths: np.ndarray | Sequence[int]) -> np.ndarray:
        """The known sizes of the images that are under none of these paths."""
        kept = (self.paths == _UNKNOWN) | ~np.isin(self.paths, paths)
        return np.unique(self.sizes[kept & (self.sizes > 0)])

    def read_contents(self, sizes: np.ndarray, budget: int, contents: dict[int, int]) -> tuple[int, int]:
        """Read the images of these sizes.

        Args:
            budget: bytes to read at most.
            contents: the content of each path that was read, for both sides.

        Returns:
            What is left of the budget, and how many images were not read for want of it.
        """
        places = np.flatnonzero(np.isin(self.sizes, sizes))
        missed = 0
        for row in np.unique(np.searchsorted(self.ends, places, side="right")).tolist():
            span = self.span(row)
            first, last = np.searchsorted(places, [span.start, span.stop])
            wanted = [place for place in places[first:last].tolist() if not self._is_read(place, contents)]
            if not wanted:
                continue
            if (budget := budget - int(self.sizes[wanted].sum())) < 0:
                missed += len(wanted)
                continue
            try:
                sample = self.samples[int(self.kept[row])]
            except BadRow:  # it has changed since it was checked
                continue
            images = list(image_sources(sample.messages))
            for place in wanted:
                try:
                    content = _number(read_encoded(images[place - span.start], sample.access))
                except (InputError, IndexError, OSError):  # an image that cannot be read is told elsewhere
                    continue
                self.ids[place] = content
                if self.paths[place] != _UNKNOWN:
                    contents[int(self.paths[place])] = content
        return max(budget, 0), missed

    def _is_read(self, place: int, contents: Mapping[int, int]) -> bool:
        content = contents.get(int(self.paths[place]))
        if content is not None:
            self.ids[place] = content
        return content is not None


def _number(data: bytes) -> int:
    """A number that is the same for the same bytes, and not 0."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big") or 1
