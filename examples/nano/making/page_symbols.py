"""The content of each patch of a page as symbols, and fixed features for these symbols.

Vision side and language side are warm-started separately and meet here: the vision side learns to predict the letters
of each patch and to output the features of these symbols, and the language model learns to read such features. They
also encode the place on the page, so that the language model can follow a line.

A patch has up to `SLOTS` letters, one for each quarter of its width, by the letters' centres, and the height of its
line.
"""

import math

import numpy as np
import torch

from examples.nano.making.documents.document import Document

LETTERS = [chr(code) for code in range(33, 127)]
SLOTS = 4
PARTS = {**{f"letter {slot}": 1 + len(LETTERS) for slot in range(SLOTS)}, "height": 1 + 4}
"""Part -> number of its symbols; symbol 0 is empty."""
WIDTHS = {**{f"letter {slot}": 40 for slot in range(SLOTS)}, "height": 8, "place": 24}
"""Part -> its channels in the features. "place" has no symbols: it depends on the query alone."""
SLOWEST, FASTEST = 0.25, 1.6  # radians between neighbouring places

_NUMBER = {letter: number for number, letter in enumerate(LETTERS, start=1)}


def page_symbols(document: Document, patch: int = 14) -> np.ndarray:
    """Symbols of a page's patches in reading order: (patches, parts), int64.

    Args:
        patch: side of a patch in pixels.
    """
    side = document.image.width // patch
    symbols = np.zeros((side, side, len(PARTS)), np.int64)
    height = list(PARTS).index("height")
    for letter, x, y in document.letters:
        row, column = min(max(int(y // patch), 0), side - 1), min(max(int(x // patch), 0), side - 1)
        slot = min(int((x / patch - column) * SLOTS), SLOTS - 1)
        # Two narrow letters in one quarter: the second moves one slot to the right, or the first one to the left.
        taken = symbols[row, column, :SLOTS]
        if taken[slot] and slot + 1 < SLOTS and not taken[slot + 1]:
            slot += 1
        elif taken[slot] and slot and not taken[slot - 1]:
            taken[slot - 1] = taken[slot]
        taken[slot] = _NUMBER[letter]
        symbols[row, column, height] = 1 + _quarter(y / patch - row)
    return symbols.reshape(side * side, -1)


def _quarter(share: float) -> int:
    """In which quarter of a patch a position lies, given as a share of its side."""
    return min(max(int(share * 4), 0), 3)


def symbol_features(width: int, seed: int = 0) -> list[torch.Tensor]:
    """For each part the features of its symbols, (symbols, width): random in its own channels, 0 for symbol 0.

    A letter has the same code in all slots, each in its own channels.
    """
    generator = torch.Generator().manual_seed(seed)
    codes: dict[str, torch.Tensor] = {}
    start = 0
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
        reading: (queries, patches), the attention weights of each query (see `start.place_weights`).

    Returns:
        (..., queries, width)
    """
    features = reading @ sum(table[symbols[..., number]] for number, table in enumerate(tables))
    features[..., -WIDTHS["place"] :] = place_waves(math.isqrt(len(reading)), WIDTHS["place"])
    return features


def place_waves(side: int, channels: int, patches: int | None = None) -> torch.Tensor:
    """Sines and cosines of the rows, then of the columns, of a square grid: (side x side, channels).

    Args:
        patches: in a row of the page; by default `side`.
    """
    frequencies = torch.logspace(math.log10(SLOWEST), math.log10(FASTEST), channels // 4)
    at = (torch.arange(side) + 0.5) / side * (patches or side)
    waves = torch.cat([(at[:, None] * frequencies).sin(), (at[:, None] * frequencies).cos()], -1)
    rows, columns = waves[:, None].expand(side, side, -1), waves.expand(side, side, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)
