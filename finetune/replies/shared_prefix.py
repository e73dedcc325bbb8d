"""The common prefix of several prompts of a batch, computed once: the page and the text before it.

    row 1   ....<img>page A</img>  ..What is the date?
    row 2   ....<img>page A</img>  What is the total in March?
    row 3   <img>page B, later</img>  ...........Who signed?

Each distinct prefix runs through the model once, its keys and values are copied to every row that begins with it, and
`generate` continues with the rests. Both blocks are padded on the left (dots).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateOutput

from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration


@dataclass(frozen=True)
class PrefixedBatch:
    """A batch cut into prefixes and rests.

    Attributes:
        prefixes: the distinct prefixes; empty where rows are whole.
        prefix_of: (rows,) the number of each row's prefix.
        rests: (rows,) what follows it, at least one token.
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
    """Cut each row after the common prefix of its group, never inside an image.

    A row that is alone in its group is cut after its last image; without images, before its last token.

    Args:
        rows: token ids.
        groups: (rows,) the same key for rows that may share a prefix.
        config: of the model.
    """
    members: dict[Hashable, list[list[int]]] = {}
    for ids, group in zip(rows, groups, strict=True):
        members.setdefault(group, []).append(list(ids))
    prefixes: list[list[int]] = []
    number_of: dict[Hashable, int] = {}
    for group, own in members.items():
        number_of[group] = len(prefixes)
        prefixes.append(_prefix(own, config))
    prefix_of = [number_of[group] for group in groups]
    rests = [list(ids[len(prefixes[number]) :]) for ids, number in zip(rows, prefix_of, strict=True)]
    return PrefixedBatch(prefixes, prefix_of, rests)


def _prefix(rows: list[list[int]], config: QwenVLConfig) -> list[int]:
    # The common prefix of the smallest and the largest row is that of all rows.
    first, last = min(rows), max(rows)
    shortest = min(map(len, rows)) - 1
    length = next((place for place in range(shortest) if first[place] != last[place]), shortest)
    common = first[:length]
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
) -> GenerateOutput | torch.LongTensor:
    """Generate as `model.generate` would on the whole rows.

    Args:
        model: without PEFT's wrapper.
        batch: the rows.
        features: for each row the features of its images, (n_queries, hidden) each, in reading order.
        pad: id of the padding token.
        generation: keyword arguments of `generate`.

    Returns:
        As `generate`: (rows, `batch.length` + new tokens) the padded rows with the generated tokens, unless
        `generation` asks for a dictionary.
    """
    device = model.device
    ids, mask = _padded(batch.rests, pad, device)
    if not batch.prefixes:
        whole = _stacked([one for own in features for one in own])
        return model.generate(input_ids=ids, attention_mask=mask, image_features=whole, **generation)
    image_end = model.config.image_end_id  # None for a text-only model
    in_prefix = [0 if image_end is None else prefix.count(image_end) for prefix in batch.prefixes]
    first_rows = [batch.prefix_of.index(number) for number in range(len(batch.prefixes))]
    seen = [one for row, count in zip(first_rows, in_prefix, strict=True) for one in features[row][:count]]
    prefix_ids, prefix_mask = _padded(batch.prefixes, pad, device)
    # As `generate` does, with the head: where the model is sharded, all forwards of text call the same modules.
    cache: Cache = model(
        input_ids=prefix_ids,
        attention_mask=prefix_mask,
        image_features=_stacked(seen),
        use_cache=True,
        logits_to_keep=1,
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
    """(rows, length) ids padded on the left, and their attention mask."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _stacked(features: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return torch.stack(list(features)) if features else None
