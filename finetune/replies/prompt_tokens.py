"""Prompts as they are compared: where two are equal, their keys and values are too."""

from collections.abc import Sequence

from qwenvl import QwenVLConfig

BLOCK = 16
"""Tokens that are compared at once."""


def image_starts(ids: Sequence[int], config: QwenVLConfig) -> list[int]:
    """Where the `<img>` of each whole image is, in order (as `qwenvl.model.image_span.image_span_starts`)."""
    if config.image_token_id is None:
        return []
    count = config.n_queries
    span = [config.image_start_id, *[config.image_token_id] * count, config.image_end_id]
    starts, place, ids = [], 0, list(ids)
    while config.image_start_id in ids[place:]:
        place = ids.index(config.image_start_id, place)
        if ids[place : place + count + 2] == span:
            starts.append(place)
        place += 1
    return starts


def whole_images(ids: Sequence[int], length: int, config: QwenVLConfig) -> int:
    """How many images are in the first tokens of a prompt, which do not end within one."""
    return len(image_starts(ids[:length], config))


def without_half_image(ids: Sequence[int], length: int, config: QwenVLConfig) -> int:
    """The most tokens from the beginning, up to `length`, that do not end within an image."""
    for start in image_starts(ids, config):
        if start < length < start + config.n_queries + 2:
            return start
    return length


def common_prefix(rows: Sequence[Sequence[int]], config: QwenVLConfig) -> list[int]:
    """What rows of the same images all begin with, before the last token of any and not cut inside an image."""
    # The common prefix of the smallest and the largest row is that of all rows.
    first, last = min(map(list, rows)), max(map(list, rows))
    shortest = min(map(len, rows)) - 1
    length = next((place for place in range(shortest) if first[place] != last[place]), shortest)
    return first[: min(without_half_image(row, length, config) for row in (first, last))]


class ComparedTokens:
    """A row's tokens, in which an image is its key.

    Attributes:
        tokens: ids, and in place of the ids of an image's features the image's key.
        chain: after each whole block the hash of all tokens so far.
    """

    def __init__(
        self, ids: Sequence[int], image_keys: Sequence[str], adapter: str | None, config: QwenVLConfig
    ) -> None:
        self.tokens: list[int | str] = list(ids)
        for start, key in zip(image_starts(ids, config), image_keys, strict=True):
            self.tokens[start + 1 : start + 1 + config.n_queries] = [key] * config.n_queries
        self.adapter = adapter
        self.chain: list[int] = []
        so_far = hash(adapter)
        for start in range(0, len(self.tokens) - BLOCK + 1, BLOCK):
            so_far = hash((so_far, tuple(self.tokens[start : start + BLOCK])))
            self.chain.append(so_far)

    def common(self, other: "ComparedTokens") -> int:
        """How many tokens both begin with; 0 where adapters differ."""
        if self.adapter != other.adapter:
            return 0
        low, high = 0, min(len(self.chain), len(other.chain))
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.chain[middle - 1] == other.chain[middle - 1] else (low, middle - 1)
        place, mine, theirs = low * BLOCK, self.tokens, other.tokens
        if mine[:place] != theirs[:place]:  # equal hashes of different tokens
            return 0
        end = min(len(mine), len(theirs), place + BLOCK)
        while place < end and mine[place] == theirs[place]:
            place += 1
        return place
