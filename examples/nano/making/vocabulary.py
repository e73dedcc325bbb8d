"""The nano's vocabulary: byte-pair merges trained on its own conversations, as a `qwen.tiktoken` file."""

import base64
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import regex

from qwenvl.text.vocabulary import SPLIT_PATTERN

RANKS = 528
"""Tokens that are not control tokens: the 256 bytes and 272 merges."""


def train_vocabulary(texts: Iterable[str], ranks: int = RANKS) -> bytes:
    """Train byte-pair merges on `texts`, split as Qwen's tokenizer splits them.

    Of equally frequent pairs the first in byte order is merged, so the same texts give the same file.

    Returns:
        The content of a `qwen.tiktoken` file.
    """
    counted = Counter(piece.encode() for text in texts for piece in regex.findall(SPLIT_PATTERN, text))
    pieces = [([bytes([byte]) for byte in piece], count) for piece, count in sorted(counted.items())]
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < ranks:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for piece, count in pieces:
            for pair in pairwise(piece):
                pairs[pair] += count
        left, right = max(sorted(pairs), key=pairs.__getitem__)
        tokens.append(left + right)
        for piece, _ in pieces:
            _merge(piece, left, right)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    return "".join(lines).encode()


def _merge(piece: list[bytes], left: bytes, right: bytes) -> None:
    """Merge a pair wherever it occurs, in place."""
    place = 0
    while place < len(piece) - 1:
        if piece[place] == left and piece[place + 1] == right:
            piece[place : place + 2] = [left + right]
        place += 1
