"""The forwards that compute prompts, into a cache of rows of their own.

Padding is on the right, where causal attention does not see it, so prompts that are computed whole need no mask.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from finetune.replies.decoder import PromptRow
from finetune.replies.masks import attention_mask
from finetune.replies.prompt_tokens import BLOCK, common_prefix, whole_images
from finetune.replies.row_cache import KeysAndValues, RowCache, tokens_of
from finetune.replies.row_forward import RowForward

PAD = 0
"""Any id that is in every vocabulary and part of no image: its results are dropped."""

WORTH = 0.1
"""A common prefix is computed first where that saves this part of the positions at least."""

PREFILL_TOKENS = 8192
"""Most positions of one forward, with padding; a longer prompt has its own."""

FEW_TOKENS = 512
"""A forward with fewer is not much faster, so that prompts of any lengths are put into it."""


@dataclass(frozen=True)
class Prefilled:
    """Prompts that were computed together.

    Attributes:
        indices: of the prompts among those that were asked for.
        cache: their rows.
        logits: (rows, vocabulary) of the token after each.
    """

    indices: list[int]
    cache: RowCache
    logits: torch.Tensor


def prefill(
    forward: RowForward, rows: Sequence[PromptRow], known: Sequence[KeysAndValues | None]
) -> Iterator[Prefilled]:
    """Compute prompts: what is known of them, or common to several, is not computed again.

    Args:
        rows: of one lane.
        known: the keys and values of what each begins with, fewer tokens than it has.
    """
    fresh = [index for index, prefix in enumerate(known) if prefix is None]
    yield from _prefill_groups(forward, rows, fresh)
    prefixes = {index: prefix for index, prefix in enumerate(known) if prefix is not None}
    for group in _alike(list(prefixes), [len(rows[index].ids) - tokens_of(row) for index, row in prefixes.items()]):
        yield Prefilled(group, *continue_from(forward, [rows[i] for i in group], [prefixes[i] for i in group]))


def _prefill_groups(forward: RowForward, rows: Sequence[PromptRow], fresh: Sequence[int]) -> Iterator[Prefilled]:
    """Compute prompts of which nothing is known: common prefixes first, and then what follows them."""
    config = forward.config
    groups: dict[Hashable, list[int]] = {}
    for index in fresh:
        row = rows[index]
        # Beyond seq_length the rotary base depends on the length of the whole row, so prefixes cannot be shared.
        shares = len(row.ids) <= config.seq_length and len(row.image_keys) == len(row.features)
        alike: tuple[Hashable, ...] = tuple(row.image_keys) or tuple(row.ids[:BLOCK])
        begin = (row.adapter, alike) if shares else index
        groups.setdefault(begin, []).append(index)
    prefix_of: dict[int, list[int]] = {}
    for group in groups.values():
        ids = [rows[index].ids for index in group]
        prefix = common_prefix(ids, config) if len(group) > 1 else []
        if (len(group) - 1) * len(prefix) >= WORTH * sum(map(len, ids)):
            prefix_of |= dict.fromkeys(group, prefix)
    whole = [index for index in fresh if index not in prefix_of]
    for group in _alike(whole, [len(rows[index].ids) for index in whole]):
        yield Prefilled(group, *compute(forward, [rows[index] for index in group]))
    first = list({id(prefix): index for index, prefix in reversed(prefix_of.items())}.values())
    for those in _alike(first, [len(prefix_of[index]) for index in first]):
        # Of each prefix's first row.
        beginnings = [
            replace(
                rows[index],
                ids=prefix_of[index],
                features=rows[index].features[: whole_images(prefix_of[index], len(prefix_of[index]), config)],
            )
            for index in those
        ]
        prefixes, _ = compute(forward, beginnings)
        slots = {id(prefix_of[index]): slot for slot, index in enumerate(those)}
        members = [index for index, prefix in prefix_of.items() if id(prefix) in slots]
        for group in _alike(members, [len(rows[index].ids) - len(prefix_of[index]) for index in members]):
            known = [prefixes.row(slots[id(prefix_of[index])]) for index in group]
            yield Prefilled(group, *continue_from(forward, [rows[index] for index in group], known))


def _alike(indices: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Put rows into forwards: those of similar length together, so that there is little padding."""
    group: list[int] = []
    longest = 0
    for length, index in sorted(zip(lengths, indices, strict=True), key=lambda pair: -pair[0]):
        tokens = (len(group) + 1) * longest
        if group and (tokens > PREFILL_TOKENS or (len(group) * longest >= FEW_TOKENS and length < 0.9 * longest)):
            yield group
            group = []
        if not group:
            longest = length
        group.append(index)
    if group:
        yield group


def compute(forward: RowForward, rows: Sequence[PromptRow]) -> tuple[RowCache, torch.Tensor]:
    """Compute whole prompts, of any lengths."""
    cache = RowCache()
    lengths = [len(row.ids) for row in rows]
    cache.begin(len(rows), max(lengths))
    # Each place of padding is a sequence of its own, one token long, by its position 0: a row's rotary base depends
    # on how many real tokens it has.
    positions = [[*range(length), *[0] * (cache.new - length)] for length in lengths]
    logits = _run(forward, cache, rows, [row.ids for row in rows], [row.features for row in rows], positions)
    cache.end(lengths)
    return cache, logits


def continue_from(
    forward: RowForward, rows: Sequence[PromptRow], prefixes: Sequence[KeysAndValues]
) -> tuple[RowCache, torch.Tensor]:
    """Compute what follows known prefixes, one for each row, at least one token; images are in one of both parts."""
    known = [tokens_of(prefix) for prefix in prefixes]
    rests = [row.ids[count:] for row, count in zip(rows, known, strict=True)]
    new = max(map(len, rests))
    cache = RowCache.of(prefixes, new)
    cache.begin(len(rows), new)
    positions = [list(range(count, count + new)) for count in known]
    features = [
        row.features[whole_images(row.ids, count, forward.config) :] for row, count in zip(rows, known, strict=True)
    ]
    logits = _run(forward, cache, rows, rests, features, positions)
    cache.end([len(rest) for rest in rests])
    return cache, logits


def _run(
    forward: RowForward,
    cache: RowCache,
    rows: Sequence[PromptRow],
    ids: Sequence[Sequence[int]],
    features: Sequence[Sequence[torch.Tensor]],
    positions: list[list[int]],
) -> torch.Tensor:
    """(rows, vocabulary) logits after each row's last token."""
    padded = [[*row, *[PAD] * (cache.new - len(row))] for row in ids]
    images = [one for row in features for one in row]
    position_ids = torch.tensor(positions, device=forward.device)
    begins = cache.width == cache.new
    return forward(
        [row.adapter for row in rows],
        input_ids=torch.tensor(padded, device=forward.device),
        position_ids=position_ids,
        attention_mask=None if begins else attention_mask(position_ids, cache.width, forward.config, forward.dtype),
        image_features=torch.stack(images) if images else None,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=torch.tensor([[len(row) - 1] for row in ids], device=forward.device),
    )
