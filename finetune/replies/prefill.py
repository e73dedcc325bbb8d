"""The forwards that compute prompts, into a cache of rows of their own.

Padding is on the right, where causal attention does not see it, so prompts that are computed whole need no mask.
"""

from collections.abc import Sequence

import torch

from finetune.replies.decoder import PromptRow
from finetune.replies.masks import attention_mask
from finetune.replies.row_cache import KeysAndValues, RowCache
from finetune.replies.shared_prefix import cut_prefixes
from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration

PAD = 0
"""Any id that is in every vocabulary and part of no image: its results are dropped."""


def prefill(model: QwenVLForConditionalGeneration, rows: Sequence[PromptRow]) -> tuple[RowCache, torch.Tensor]:
    """Compute prompts: their common prefixes once, where that saves at least a tenth of the positions.

    Returns:
        The rows' cache, and (rows, vocabulary) logits of the token after each.
    """
    ids, config = [row.ids for row in rows], model.config
    # Beyond seq_length the rotary base depends on the length of the whole row, so prefixes cannot be shared.
    if len(rows) > 1 and max(map(len, ids)) <= config.seq_length:
        # Text alone is grouped by how it begins.
        cut = cut_prefixes(ids, [tuple(row.image_keys) or tuple(row.ids[:16]) for row in rows], config)
        whole = len(ids) * max(map(len, ids))
        if all(cut.prefixes) and cut.tokens < 0.9 * whole:
            first = [cut.prefix_of.index(number) for number in range(len(cut.prefixes))]
            shared = [
                PromptRow(prefix, rows[row].features[: images_in(prefix, config)])
                for row, prefix in zip(first, cut.prefixes, strict=True)
            ]
            prefixes, _ = compute(model, shared)
            return continue_from(model, rows, [prefixes.row(number) for number in cut.prefix_of])
    return compute(model, rows)


def images_in(ids: Sequence[int], config: QwenVLConfig) -> int:
    """How many whole images there are in the beginning of a prompt that is not cut inside of one."""
    return 0 if config.image_end_id is None else list(ids).count(config.image_end_id)


def compute(model: QwenVLForConditionalGeneration, rows: Sequence[PromptRow]) -> tuple[RowCache, torch.Tensor]:
    """Compute whole prompts, of any lengths."""
    cache = RowCache()
    lengths = [len(row.ids) for row in rows]
    cache.begin(len(rows), max(lengths))
    # Each place of padding is a sequence of its own, one token long, by its position 0: a row's rotary base depends
    # on how many real tokens it has.
    positions = [[*range(length), *[0] * (cache.new - length)] for length in lengths]
    logits = _forward(model, cache, [row.ids for row in rows], [row.features for row in rows], positions)
    cache.end(lengths)
    return cache, logits


def continue_from(
    model: QwenVLForConditionalGeneration, rows: Sequence[PromptRow], prefixes: Sequence[KeysAndValues]
) -> tuple[RowCache, torch.Tensor]:
    """Compute what follows known prefixes, one for each row, at least one token; images are in one of both parts."""
    known = [len(prefix[0][0]) for prefix in prefixes]
    rests = [row.ids[count:] for row, count in zip(rows, known, strict=True)]
    new = max(map(len, rests))
    cache = RowCache.of(prefixes, new)
    cache.begin(len(rows), new)
    positions = [list(range(count, count + new)) for count in known]
    features = [
        row.features[images_in(row.ids[:count], model.config) :] for row, count in zip(rows, known, strict=True)
    ]
    logits = _forward(model, cache, rests, features, positions)
    cache.end([len(rest) for rest in rests])
    return cache, logits


def _forward(
    model: QwenVLForConditionalGeneration,
    cache: RowCache,
    ids: Sequence[Sequence[int]],
    features: Sequence[Sequence[torch.Tensor]],
    positions: list[list[int]],
) -> torch.Tensor:
    """(rows, vocabulary) logits after each row's last token."""
    padded = [[*row, *[PAD] * (cache.new - len(row))] for row in ids]
    images = [one for row in features for one in row]
    position_ids = torch.tensor(positions, device=model.device)
    begins = cache.width == cache.new
    output = model(
        input_ids=torch.tensor(padded, device=model.device),
        position_ids=position_ids,
        attention_mask=None if begins else attention_mask(position_ids, cache.width, model),
        image_features=torch.stack(images) if images else None,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=torch.tensor([[len(row) - 1] for row in ids], device=model.device),
    )
    logits: torch.Tensor = output.logits[:, 0]
    return logits
