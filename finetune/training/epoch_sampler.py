"""The order of the training samples: where each epoch draws its own, and where processes share an epoch."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler, SequentialSampler

from finetune.data.epoch_draw import EpochDraws


class EpochSampler(Sampler[int]):
    """Positions in a dataset of the samples that an epoch draws, the same on every process and after a resume.

    Args:
        draws: the samples of each epoch.
        samples: of the dataset, ascending, once each: all that any epoch draws.
        seed: with the epoch's number, that of its order.
        shuffle: False keeps the order of the samples.
    """

    def __init__(self, draws: EpochDraws, samples: Sequence[int], seed: int, shuffle: bool):
        self._draws, self._samples = draws, np.asarray(samples, np.int64)
        self._seed, self._shuffle = seed, shuffle
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The number of the epoch that the next iteration is of."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._draws.size

    def __iter__(self) -> Iterator[int]:
        places = np.searchsorted(self._samples, self._draws.indices(self._epoch))
        if self._shuffle:
            generator = torch.Generator().manual_seed(self._seed + self._epoch)
            places = places[torch.randperm(len(places), generator=generator).numpy()]
        return iter(places.tolist())


class SharedEpochSampler(Sampler[int]):
    """An epoch of several processes: the order that one process has, with empty places up to whole rounds of batches.

    Accelerate alone would fill the last round with samples from the epoch's start, some of them once more than the
    others, and how many depends on the number of processes. So the samples of a step do not.

    Args:
        order: of one process.
        round: samples of all processes' next batches together.
        empty: position of the empty place in the dataset.
    """

    def __init__(self, order: EpochSampler | SeedableRandomSampler | SequentialSampler, round: int, empty: int):
        self._order, self._round, self._empty = order, round, empty

    def set_epoch(self, epoch: int) -> None:
        """The number of the epoch that the next iteration is of."""
        if not isinstance(self._order, SequentialSampler):
            self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self._order) // self._round) * self._round

    def __iter__(self) -> Iterator[int]:
        yield from self._order
        for _ in range(len(self) - len(self._order)):
            yield self._empty
