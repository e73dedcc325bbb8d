"""The size of one forward, and the largest forward that conversations can be packed into."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.checks.checked import Checked


@dataclass(frozen=True)
class Workload:
    """The size of one forward of packed conversations.

    Attributes:
        tokens: of all conversations.
        supervised: tokens with a label.
        sequences: conversations.
        images: of all conversations.
        sequence_length: tokens of the longest conversation.
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
    """A bound, in each respect, on packs of at most `batch` conversations and `budget` tokens.

    Supervised tokens and images are bounded each by the conversations with most of them per token.

    Args:
        lengths, supervised, images: of each conversation (see `data.checked.Checked`); at least one.
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
    """A bound on the sum of `values` over at most `most` conversations and `tokens` tokens (fractional knapsack)."""
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
    """How many conversations fit into `tokens`, the shortest first, at most `most`."""
    count, left = 0, tokens
    for length in sorted(lengths)[:most]:
        left -= length
        if left < 0:
            break
        count += 1
    return max(1, count)


def different_rows(checked: Checked, seed: int, batch: int) -> dict[str, list[int]]:
    """`lengths`, `supervised` and `images` of an epoch's conversations, for `worst_workload`.

    Conversations with equal values are listed `batch` times at most, as a pack has no more of them. This leaves some
    thousands of a million.
    """
    if checked.epochs(seed) is None:
        places = np.searchsorted(checked.kept, checked.weighted_indices(seed))
    else:  # any of the samples may be drawn, as often as its weight rounded up
        times = np.ceil(np.array(checked.weights)).astype(np.int64)[checked.source]
        places = np.repeat(np.arange(len(checked.kept)), times)
    columns = np.stack([values[places] for values in (checked.lengths, checked.supervised, checked.images)])
    different, times = np.unique(columns, axis=1, return_counts=True)
    several = np.repeat(different, np.minimum(times, batch), axis=1)
    return dict(zip(("lengths", "supervised", "images"), several.tolist(), strict=True))
