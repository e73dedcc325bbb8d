"""What one forward is, as the plan counts it; and the largest that conversations can make."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.checking import Checked


@dataclass(frozen=True)
class Workload:
    """One forward: a pack of conversations.

    Attributes:
        tokens: of all of them.
        supervised: tokens that are trained.
        sequences: conversations.
        images: of all of them.
        sequence_length: tokens of the longest.
    """

    tokens: int
    supervised: int
    sequences: int
    images: int
    sequence_length: int


def worst_workload(
    lengths: Sequence[int],
    supervised: Sequence[int],
    images: Sequence[int],
    *,
    budget: int | None,
    batch: int,
) -> Workload:
    """No pack of these conversations is larger in any respect: at most `batch` of them and `budget` tokens.

    Of trained tokens and images as many are counted as the conversations that are densest in them would bring.

    Args:
        lengths, supervised, images: of each conversation, as `data.checking.Checked` has them; at least one.
        budget: tokens of one forward (`packing.pack`); None is one conversation at a time.
        batch: conversations that are packed together.
    """
    longest = max(lengths)
    most = 1 if budget is None else batch
    room = max(longest, budget or 0)
    tokens = min(room, sum(sorted(lengths)[-most:]))
    return Workload(
        tokens=tokens,
        supervised=min(_densest(supervised, lengths, tokens, most), tokens - 1),
        sequences=_most_sequences(lengths, tokens, most),
        images=_densest(images, lengths, tokens, most),
        sequence_length=longest,
    )


def _densest(values: Sequence[int], lengths: Sequence[int], tokens: int, most: int) -> int:
    """Most of `values` that so many tokens of so many conversations can bring, a part of the last included."""
    by_size = sum(sorted(values)[-most:])
    left, brought = tokens, 0.0
    for value, length in sorted(zip(values, lengths, strict=True), key=lambda pair: -pair[0] / pair[1]):
        taken = min(1.0, left / length)
        brought += value * taken
        left -= length
        if left <= 0:
            break
    return min(by_size, int(brought + 1e-9))


def _most_sequences(lengths: Sequence[int], tokens: int, most: int) -> int:
    count, left = 0, tokens
    for length in sorted(lengths)[:most]:
        left -= length
        if left < 0:
            break
        count += 1
    return max(1, count)


def different_rows(checked: Checked, seed: int, batch: int) -> dict[str, list[int]]:
    """`lengths`, `supervised` and `images` of an epoch's conversations, as the plan takes them.

    Of conversations that are alike in all three as many as a batch can have: of a million there are some thousands.
    """
    places = np.searchsorted(checked.kept, checked.weighted_indices(seed))
    columns = np.stack([values[places] for values in (checked.lengths, checked.supervised, checked.images)])
    different, times = np.unique(columns, axis=1, return_counts=True)
    several = np.repeat(different, np.minimum(times, batch), axis=1)
    return dict(zip(("lengths", "supervised", "images"), several.tolist(), strict=True))
