"""What several prompts of a batch begin with, computed once: the page and all before it, for all questions on it.

    row 1   ....<img>page A</img>  ..What is the date?
    row 2   ....<img>page A</img>  What is the total in March?
    row 3   <img>page B, later</img>  ...........Who signed?

Each distinct prefix is run once, its keys and values are given to every row that begins with it, and `generate` goes
on with the rest. Both blocks are padded on the left (dots).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration


@dataclass(frozen=True)
class PrefixedBatch:
    """A batch cut into prefixes and rests.

    Attributes:
        prefixes: the distinct ones; none: rows are whole.
        prefix_of: (rows,) which of them each row begins with.
        rests: what comes after, at least a token.
    """

    prefixes: list[list[int]]
    prefix_of: list[int]
    rests: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens of a row, with padding."""
        return max(map(len, self.prefixes), default=0) + max(map(len, self.rests))

    @property
    def tokens(self) -> int:
        """Positions that are computed, with padding."""
        prefixes = len(self.prefixes) * max(map(len, self.prefixes), default=0)
        return prefixes + len(self.rests) * max(map(len, self.rests))


def cut_prefixes(rows: Sequence[Sequence[int]], groups: Sequence[Hashable], config: QwenVLConfig) -> PrefixedBatch:
    """Cut each row after what all rows of its group have in common; never inside an image.

    A row that is alone in its group is cut where its last image ends, as the others are; without an image before its
    last token.

    Args:
        rows: token ids.
        groups: (rows,) rows that may share a prefix have the same.
    """
    members: dict[Hashable, list[list[int]]] = {}
    for ids, group in zip(rows, groups, strict=True):
        members.setdefault(group, []).append(list(ids))
    prefixes, number_of = [], {}
    for group, own in members.items():
        number_of[group] = len(prefixes)
        prefixes.append(_prefix(own, config))
    prefix_of = [number_of[group] for group in groups]
    rests = [list(ids[len(prefixes[number]) :]) for ids, number in zip(rows, prefix_of, strict=True)]
    return PrefixedBatch(prefixes, prefix_of, rests)


def _prefix(rows: list[list[int]], config: QwenVLConfig) -> list[int]:
    # What the first and the last in order have in common, all between them have.
    first, last = min(rows), max(rows)
    shortest = min(map(len, rows)) - 1
    parted = next((place for place in range(shortest) if first[place] != last[place]), shortest)
    common = first[:parted]
    images_end = len(common) - common[::-1].index(config.image_end_id) if config.image_end_id in common else 0
    if len(rows) == 1 and images_end:
        return common[:images_end]
    opened = common[images_end:]
    if config.image_start_id in opened:
        return common[: images_end + opened.index(config.image_start_id)]
    return common


@torch.no_grad()
def generate_from_prefixes(
    model: QwenVLForConditionalGeneration,
    batch: PrefixedBatch,
    features: Sequence[Sequence[torch.Tensor]],
    pad: int,
    **generation: Any,
) -> torch.Tensor:
    """As `model.generate` on the whole rows.

    Args:
        features: for each row those of its images, (n_queries, hidden) each, in reading order.
        pad: the id to fill up with.
        generation: for `generate`.

    Returns:
        (rows, length + new tokens): the padded rows, whose length is that of the longest prefix and the longest rest
        together, and what was generated.
    """
    device = model.device
    ids, mask = _padded(batch.rests, pad, device)
    if not batch.prefixes:
        whole = _stacked([one for own in features for one in own])
        return model.generate(input_ids=ids, attention_mask=mask, image_features=whole, **generation)
    in_prefix = [prefix.count(model.config.image_end_id) for prefix in batch.prefixes]
    first_rows = [batch.prefix_of.index(number) for number in range(len(batch.prefixes))]
    seen = [one for row, count in zip(first_rows, in_prefix, strict=True) for one in features[row][:count]]
    prefix_ids, prefix_mask = _padded(batch.prefixes, pad, device)
    cache: Cache = model.transformer(
        input_ids=prefix_ids, attention_mask=prefix_mask, image_features=_stacked(seen), use_cache=True
    ).past_key_values
    prefix_of = torch.tensor(batch.prefix_of, device=device)
    cache.batch_select_indices(prefix_of)
    rest = [one for own, number in zip(features, batch.prefix_of, strict=True) for one in own[in_prefix[number] :]]
    return model.generate(
        input_ids=torch.cat([prefix_ids[prefix_of], ids], dim=1),
        attention_mask=torch.cat([prefix_mask[prefix_of], mask], dim=1),
        image_features=_stacked(rest),
        past_key_values=cache,
        **generation,
    )


def _padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, length) ids filled up on the left, and their mask."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _stacked(features: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return torch.stack(list(features)) if features else None
