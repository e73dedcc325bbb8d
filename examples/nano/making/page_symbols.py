"""What stands in each patch of a page, as symbols, and the features that stand for them.

Vision and language are warmed up apart, and meet here: the vision side learns to say which letters a patch holds and
to give the features of these symbols, and the language model learns to read pages of such features. Features also say
of which place of the page they are, so that a line can be followed by its row.

A patch holds up to `SLOTS` letters, by the quarter of its width in which their middles lie, and its line's height.
"""

import math

import numpy as np
import torch

from examples.nano.making.documents.document import Document

LETTERS = [chr(code) for code in range(33, 127)]
SLOTS = 4
PARTS = {**{f"letter {slot}": 1 + len(LETTERS) for slot in range(SLOTS)}, "height": 1 + 4}
"""Part -> how many symbols it has; 0 is nothing."""
WIDTHS = {**{f"letter {slot}": 40 for slot in range(SLOTS)}, "height": 8, "place": 24}
"""Part -> channels of the features that are its own; of places there are no symbols, but as many as queries."""
SLOWEST, FASTEST = 0.25, 1.6  # radians from one place to the next

_NUMBER = {letter: number for number, letter in enumerate(LETTERS, start=1)}


def page_symbols(document: Document, patch: int = 14) -> np.ndarray:
    """Symbols of a page's patches in reading order: (patches, parts), int64."""
    side = document.image.width // patch
    symbols = np.zeros((side, side, len(PARTS)), np.int64)
    height = list(PARTS).index("height")
    for letter, x, y in document.letters:
        row, column = min(max(int(y // patch), 0), side - 1), min(max(int(x // patch), 0), side - 1)
        slot = min(int((x / patch - column) * SLOTS), SLOTS - 1)
        # Two narrow letters of one quarter: the second takes the next, or the first gives way to the left.
        taken = symbols[row, column, :SLOTS]
        if taken[slot] and slot + 1 < SLOTS and not taken[slot + 1]:
            slot += 1
        elif taken[slot] and slot and not taken[slot - 1]:
            taken[slot - 1] = taken[slot]
        taken[slot] = _NUMBER[letter]
        symbols[row, column, height] = 1 + _quarter(y / patch - row)
    return symbols.reshape(side * side, -1)


def _quarter(share: float) -> int:
    return min(max(int(share * 4), 0), 3)


def symbol_features(width: int, seed: int = 0) -> list[torch.Tensor]:
    """For each part the features of its symbols, (symbols, width): random, in channels of its own; nothing is 0.

    All slots have the same code for a letter, each in its own channels.
    """
    generator = torch.Generator().manual_seed(seed)
    codes, start = {}, 0
    assert sum(WIDTHS.values()) == width, (sum(WIDTHS.values()), width)
    tables = []
    for name, count in PARTS.items():
        own = WIDTHS[name]
        kind = name.split()[0]
        if kind not in codes:
            codes[kind] = torch.randn(count, own, generator=generator)
            codes[kind][0] = 0
        table = torch.zeros(count, width)
        table[:, start : start + own] = codes[kind]
        tables.append(table)
        start += own
    return tables


def page_features(symbols: torch.Tensor, tables: list[torch.Tensor], reading: torch.Tensor) -> torch.Tensor:
    """The features of pages.

    Args:
        symbols: (..., patches, parts).
        tables: of `symbol_features`.
        reading: (queries, patches), how much each query reads of each patch (see `start.place_weights`).

    Returns:
        (..., queries, width)
    """
    features = reading @ sum(table[symbols[..., number]] for number, table in enumerate(tables))
    features[..., -WIDTHS["place"] :] = place_waves(math.isqrt(len(reading)), WIDTHS["place"])
    return features


def place_waves(side: int, channels: int, patches: int | None = None) -> torch.Tensor:
    """Sines and cosines of the rows, then of the columns, of a square grid: (side x side, channels).

    Args:
        patches: how many patches a row of the page has, where that is not `side`.
    """
    frequencies = torch.logspace(math.log10(SLOWEST), math.log10(FASTEST), channels // 4)
    at = (torch.arange(side) + 0.5) / side * (patches or side)
    waves = torch.cat([(at[:, None] * frequencies).sin(), (at[:, None] * frequencies).cos()], -1)
    rows, columns = waves[:, None].expand(side, side, -1), waves.expand(side, side, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)
