"""Which sequences share one forward: no padding, up to a budget of tokens, each with its images."""

from collections.abc import Sequence
from typing import Any

import torch

from finetune.batches.images import cut_images

# Entries of a batch that run along its tokens, with shape (1, tokens).
TOKEN_COLUMNS = ("input_ids", "labels", "position_ids")


def pack(lengths: Sequence[int], budget: int | None) -> list[list[int]]:
    """Group sequences into packs of at most `budget` tokens, fewest first: first fit, longest first.

    Args:
        lengths: tokens of each sequence.
        budget: tokens of one pack; a longer sequence gets a pack of its own. None: every sequence by itself.

    Returns:
        Indices of each pack, in their order in `lengths`; every index once.
    """
    if budget is None:
        return [[index] for index in range(len(lengths))]
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = next((number for number, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            packs.append([])
            room.append(max(budget, lengths[index]))
            place = len(packs) - 1
        packs[place].append(index)
        room[place] -= lengths[index]
    return [sorted(members) for members in packs]


def split_batch(batch: dict[str, Any], budget: int | None) -> list[dict[str, Any]]:
    """Cut a collated batch into packs that are run one after the other.

    The loss is a sum over supervised tokens, so how a batch is cut changes memory and speed, not the gradient.

    Args:
        batch: as `collate.Collator` makes it.
        budget: tokens of one forward; see `pack`.

    Returns:
        Batches of the same form, each with the sequences of one pack.
    """
    lengths = batch["sequence_lengths"].tolist()
    packs = pack(lengths, budget)
    if len(packs) == 1:
        return [batch]
    token_ends = batch["sequence_lengths"].cumsum(0).tolist()
    image_ends = batch["sequence_images"].cumsum(0).tolist()

    def part(values: torch.Tensor, ends: list[int], members: list[int], dim: int) -> torch.Tensor:
        pieces = [values.narrow(dim, ends[i - 1] if i else 0, ends[i] - (ends[i - 1] if i else 0)) for i in members]
        return torch.cat(pieces, dim=dim)

    parts = []
    for members in packs:
        one = {name: part(batch[name], token_ends, members, 1) for name in TOKEN_COLUMNS}
        for name in ("sequence_lengths", "sequence_images", "samples"):
            one[name] = batch[name][members]
        if one["sequence_images"].sum():
            one |= cut_images(batch, part(torch.arange(image_ends[-1]), image_ends, members, 0))
        parts.append(one)
    return parts
