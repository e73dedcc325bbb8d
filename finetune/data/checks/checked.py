"""What a check of all samples found: which are trained on, how long they are, and what each epoch draws."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from finetune.data.checks.overlap import Identities
from finetune.data.epoch_draw import EpochDraws
from finetune.data.sample import BadRow, Origin


@dataclass(frozen=True, slots=True)
class TooLong:
    """A sample left out for its length.

    Attributes: `origin`; `tokens`, its length; `cost`, what of it is the work of `data.pages` and `data.views`, in
    words, empty without them.
    """

    origin: Origin
    tokens: int
    cost: str = ""


@dataclass(frozen=True, slots=True)
class Shortened:
    """A sample that is trained on without its first turns, with which it is too long.

    Attributes: `origin`; `turns_dropped`, turns left out.
    """

    origin: Origin
    turns_dropped: int


@dataclass(frozen=True)
class Checked:
    """What a check of all samples found. The arrays have one entry for each sample that is kept.

    Every sample is in exactly one of `kept`, `dropped_long` and the `refused` ones.

    Attributes:
        kept: (kept,) int64, indices into the samples, ascending.
        lengths: (kept,) int64, tokens; like the next two, after turns were left out.
        images: (kept,) int64, images of the sample; with views, pictures.
        supervised: (kept,) int64, trained tokens.
        source: (kept,) int64, which of the sources the sample is from.
        weights: of the sources.
        problems: one for each row (or sample of it) that cannot be used.
        refused: samples that are left out for these problems; more than the problems where a row makes several.
        dropped_long: samples left out because they are longer than allowed.
        shortened: those of the kept ones that lost turns.
        systems: the system messages of the kept samples, None for the default one; at most two of them, as more than
            one is all that is asked of them.
        redraws: each epoch draws its own samples by the weights. False draws once: for evaluation, and for a run that
            began when all epochs had the same draw.
        pages_left_out: pages of files that are not trained on, as `data.pages` says, over the kept samples.
        identities: what the kept samples are made of, where the rules ask for it.
        unread: columns and keys of the kept samples that hold something and are not read -> samples that have them.
        markup: kinds of markup that the kept samples train as text, as the rules allow -> samples that have them.
        digests: (total,) uint64, of all samples in order, see `row_digest`; 0 for refused ones.
        image_keys: (images of all kept samples,) uint64, in their order: equal for images of one path and their parts,
            0 for images that have none.
        pictures: of one image, see `Rules.views`.
    """

    kept: np.ndarray
    lengths: np.ndarray
    images: np.ndarray
    supervised: np.ndarray
    source: np.ndarray
    weights: list[float]
    problems: list[BadRow]
    refused: int
    dropped_long: list[TooLong]
    shortened: list[Shortened]
    systems: tuple[str | None, ...] = ()
    redraws: bool = True
    pages_left_out: int = 0
    identities: Identities = field(default_factory=Identities, repr=False)
    unread: Mapping[str, int] = field(default_factory=dict)
    markup: Mapping[str, int] = field(default_factory=dict)
    digests: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    image_keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    pictures: int = 1

    @property
    def system(self) -> str | None:
        """The system message of all kept samples; None for the default one, or where they differ in it."""
        return self.systems[0] if len(self.systems) == 1 else None

    @property
    def total(self) -> int:
        """Samples that were checked."""
        return len(self.kept) + self.refused + len(self.dropped_long)

    def weighted_indices(self, seed: int) -> list[int]:
        """The kept samples' indices in order, each as often as the weight of its source says: one draw for all times.

        A weight of 2.5 is every sample twice and a half of them a third time, which the seed draws. So evaluation data
        is used, and training data where it needs no other draws: see `epochs`.
        """
        times = np.empty(len(self.kept), np.int64)
        for number, weight in enumerate(self.weights):
            places = np.flatnonzero(self.source == number)
            whole = int(weight)
            times[places] = whole
            extra = round((weight - whole) * len(places))
            times[np.random.default_rng([seed, number]).permutation(places)[:extra]] += 1
        return np.repeat(self.kept, times).tolist()

    def epochs(self, seed: int) -> EpochDraws | None:
        """What each epoch of a training draws; None where all epochs draw the same, `weighted_indices`."""
        if not self.redraws or all(float(weight).is_integer() for weight in self.weights) or not len(self.kept):
            return None
        return EpochDraws(self.kept, self.source, self.weights, seed)

    def first_epoch(self, seed: int) -> list[int]:
        """What the first epoch draws. All epochs have as many samples."""
        draws = self.epochs(seed)
        return self.weighted_indices(seed) if draws is None else draws.indices(0).tolist()
