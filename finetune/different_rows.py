"""The conversations of an epoch as the memory plan takes them: those that are alike, only as often as it matters."""

import numpy as np

from finetune.data.checking import Checked


def different_rows(checked: Checked, seed: int, batch: int) -> dict[str, list[int]]:
    """`lengths`, `supervised` and `images` of an epoch's conversations, as the plan takes them.

    Of conversations that are alike in all three as many as a batch can have: of a million there are some thousands.
    """
    places = np.searchsorted(checked.kept, checked.weighted_indices(seed))
    columns = np.stack([values[places] for values in (checked.lengths, checked.supervised, checked.images)])
    different, times = np.unique(columns, axis=1, return_counts=True)
    several = np.repeat(different, np.minimum(times, batch), axis=1)
    return dict(zip(("lengths", "supervised", "images"), several.tolist(), strict=True))
