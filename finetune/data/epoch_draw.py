"""Which samples an epoch draws, where the weights of sources are no whole numbers: they hold over the epochs.

A source of 4 rows with the weight 0.1 gives 0.4 rows an epoch: none in some epochs and one in others. With 0.5 it
gives one half of its rows, and in the next epoch the other. With 2.5, every row twice, and such a half once more.

All epochs have the same size, as a trainer expects it: where the shares do not make a whole number, one sample more is
drawn from all sources in proportion to their shares, which leaves their proportions as they are.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import ceil, floor

import numpy as np

from finetune.recipe import Recipe

_GOLDEN = 0.6180339887498949  # steps of this size fill [0, 1) more evenly than random numbers (Weyl, Kronecker)


class EpochDraws:
    """The samples of each epoch, by its number; the same for the same seed, in whatever order epochs are asked for.

    Args:
        kept: (kept,) int64, indices of the samples, ascending.
        source: (kept,) int64, which of the sources each is from.
        weights: of the sources; at least one is positive and has samples.
        seed: of the draws.

    Attributes:
        size: samples of an epoch.
        shares: of each source, how many samples an epoch has on average by its weight, exactly.
    """

    def __init__(self, kept: np.ndarray, source: np.ndarray, weights: Sequence[float], seed: int):
        self._kept, self._seed = kept, seed
        self._places = [np.flatnonzero(source == number) for number in range(len(weights))]
        # As the decimals that they print as: 1.1 of 10 rows are 11.
        exact = [Fraction(repr(float(weight))) for weight in weights]
        self._whole = [floor(weight) for weight in exact]
        sizes = [len(places) for places in self._places]
        self.shares = [weight * size for weight, size in zip(exact, sizes, strict=True)]
        whole = [times * size for times, size in zip(self._whole, sizes, strict=True)]
        parts = [share - fixed for share, fixed in zip(self.shares, whole, strict=True)]
        drawn = ceil(sum(parts))
        missing, total = drawn - sum(parts), sum(self.shares)
        ends = [Fraction(0)]
        for part, share in zip(parts, self.shares, strict=True):
            ends.append(ends[-1] + part + (missing * share / total if total else 0))
        self._ends = ends
        self.size = drawn + sum(whole)
        self._phase = float(np.random.default_rng([seed, len(weights), 1]).random())
        self._start_again()

    def indices(self, epoch: int) -> np.ndarray:
        """(size,) int64, the samples of an epoch, ascending, each as often as it is drawn."""
        if epoch < self._next:
            self._start_again()
        while self._next <= epoch:
            extra = [self._take(number, count) for number, count in enumerate(self._counts(self._next))]
            self._next += 1
        times = np.zeros(len(self._kept), np.int64)
        for places, whole, drawn in zip(self._places, self._whole, extra, strict=True):
            times[places] = whole
            np.add.at(times, places[drawn], 1)
        return np.repeat(self._kept, times)

    def used(self, epochs: int | None = None) -> np.ndarray:
        """The samples, once each and ascending, that this many epochs draw; None for any number of epochs."""
        if epochs is None:
            every = [places for places, share in zip(self._places, self.shares, strict=True) if share]
            return self._kept[np.sort(np.concatenate(every))]
        return np.unique(np.concatenate([self.indices(epoch) for epoch in range(max(1, epochs))]))

    def _counts(self, epoch: int) -> list[int]:
        """How many samples an epoch draws from each source besides the whole times.

        The sources lie one after the other on a line, as long as their parts; samples are the whole numbers on it,
        moved by the epoch's phase. So each count is its part rounded up or down, and the sum is always the same.
        """
        phase = Fraction((self._phase + epoch * _GOLDEN) % 1.0)
        edges = [floor(end + phase) for end in self._ends]
        return [after - before for before, after in pairwise(edges)]

    def _start_again(self) -> None:
        self._next = 0
        self._round = [0] * len(self._places)
        self._left = [self._order(number) for number in range(len(self._places))]

    def _order(self, number: int) -> np.ndarray:
        """The order in which the next round goes through the samples of a source."""
        seed = [self._seed, number, self._round[number]]
        return np.random.default_rng(seed).permutation(len(self._places[number]))

    def _take(self, number: int, count: int) -> np.ndarray:
        """The next samples of a source: all come once before one comes again."""
        taken = self._left[number][:count]
        self._left[number] = self._left[number][count:]
        while len(taken) < count:
            self._round[number] += 1
            order = self._order(number)
            # Those that this epoch has already come last.
            again = np.isin(order, taken)
            order = np.concatenate([order[~again], order[again]])
            more = count - len(taken)
            taken, self._left[number] = np.concatenate([taken, order[:more]]), order[more:]
        return taken


def epochs_of(recipe: Recipe, size: int, processes: int) -> int:
    """At least the number of epochs that a run begins.

    Args:
        size: samples of an epoch.
        processes: of the run.
    """
    train = recipe.train
    if train.max_steps <= 0:
        return ceil(train.num_train_epochs)
    steps = size // (train.per_device_train_batch_size * processes * train.gradient_accumulation_steps)
    return ceil(train.max_steps / max(1, steps))
