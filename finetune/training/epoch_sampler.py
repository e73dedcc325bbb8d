"""The order of the training samples, where each epoch draws its own."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

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
