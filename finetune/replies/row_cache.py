"""Keys and values of live rows, which join and leave between two forwards.

    column   0   1   2   3   4   5
    row 0    a   b   c   d   e   .
    row 1    a   b   .   .   .   .
    row 2    a   b   c   d   .   .

A token's column is its position in its row, so a row that joins or leaves moves no other row's columns, and a forward
writes each row's new tokens behind its own. Free places (dots) hold finite values of earlier rows, and are masked.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]
"""Of one row: for each layer its keys and its values, (heads, tokens, head_dim)."""


def tokens_of(row: KeysAndValues) -> int:
    """How many tokens a row has keys and values of."""
    return row[0][0].shape[1]


COLUMNS = 64
"""Buffers have a multiple of so many columns."""


class RowCache(Cache):
    """The keys and values of rows, as the model's `past_key_values`.

    `begin` says where a forward's new tokens go, and `end` makes them part of the rows: a forward that fails between
    them changes nothing that counts.

    Attributes:
        lengths: tokens of each row.
        ntk_alpha: (rows, 1) of the rows' prompts, see `QwenVLModel._positions`; None where all are 1.
    """

    layers: "list[RowLayer]"  # type: ignore[assignment]  # the base class has layers of several kinds

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=lambda: RowLayer(self))  # type: ignore[arg-type]  # calls it only
        self.lengths: list[int] = []
        self.ntk_alpha: torch.Tensor | None = None
        self.starts: list[int] = []  # of this forward: where each row's new tokens begin
        self.new = 0  # tokens of each row in this forward, with padding
        self._places: dict[tuple[int, int, torch.device], torch.Tensor] = {}

    @classmethod
    def of(cls, rows: Sequence[KeysAndValues], room: int) -> "RowCache":
        """Rows with copies of these keys and values, and room for so many more tokens each."""
        cache = cls()
        cache.lengths = [tokens_of(row) for row in rows]
        columns = max(cache.lengths) + room
        for number, (key, value) in enumerate(rows[0]):
            layer = RowLayer(cache)
            layer.reserve(len(rows), columns, key[None], value[None])
            for slot, row in enumerate(rows):
                layer.put(slot, *row[number])
            cache.layers.append(layer)
        return cache

    @property
    def width(self) -> int:
        """Columns that a forward attends to: those of the longest row, with its new tokens."""
        return max(self.starts, default=0) + self.new

    def begin(self, rows: int, new: int) -> None:
        """The next forward has `rows` rows of `new` tokens, padded on the right."""
        self.starts = self.lengths or [0] * rows
        self.new = new
        self._places = {}

    def end(self, new: Sequence[int] | None = None) -> None:
        """The forward is done: so many of each row's tokens are real, None for all."""
        real = [self.new] * len(self.starts) if new is None else new
        self.lengths = [start + count for start, count in zip(self.starts, real, strict=True)]

    def places(self, heads: int, columns: int, device: torch.device) -> torch.Tensor:
        """(rows * heads * new,) places of the new tokens in buffers with so many columns, in this order."""
        key = heads, columns, device
        if key not in self._places:
            first = [row * heads * columns + start for row, start in enumerate(self.starts)]
            of_heads = torch.arange(0, heads * columns, columns, device=device)
            ahead = torch.arange(self.new, device=device)
            self._places[key] = (
                torch.tensor(first, device=device)[:, None, None] + of_heads[:, None] + ahead
            ).flatten()
        return self._places[key]

    def row(self, slot: int) -> KeysAndValues:
        """Views of one row's keys and values."""
        length = self.lengths[slot]
        return [(layer.keys[slot, :, :length], layer.values[slot, :, :length]) for layer in self.layers]

    def append(self, other: "RowCache") -> None:
        """Add copies of another cache's rows behind the own ones. When it fails, the own rows are as before."""
        rows, more, columns = len(self.lengths), len(other.lengths), max(*self.lengths, *other.lengths) + 1
        longest = max(other.lengths)
        for own, theirs in zip(self.layers, other.layers, strict=True):
            own.reserve(rows + more, columns)
            own.keys[rows : rows + more, :, :longest] = theirs.keys[:more, :, :longest]
            own.values[rows : rows + more, :, :longest] = theirs.values[:more, :, :longest]
        stretched = next((alpha for alpha in (self.ntk_alpha, other.ntk_alpha) if alpha is not None), None)
        if stretched is not None:
            both = ((self.ntk_alpha, rows), (other.ntk_alpha, more))
            alphas = [stretched.new_ones(count, 1) if alpha is None else alpha for alpha, count in both]
            self.ntk_alpha = torch.cat(alphas)
        self.lengths = [*self.lengths, *other.lengths]

    def drop(self, slots: Sequence[int]) -> list[int]:
        """End rows; the last ones move to their places.

        Returns:
            For each row that is left the slot that it had.
        """
        gone = set(slots)
        kept = [slot for slot in range(len(self.lengths)) if slot not in gone]
        order = list(range(len(kept)))
        late = iter([slot for slot in kept if slot >= len(kept)])
        for hole in order:
            if hole in gone:
                moved = next(late)
                for layer, (key, value) in zip(self.layers, self.row(moved), strict=True):
                    layer.put(hole, key, value)
                order[hole] = moved
        self.lengths = [self.lengths[slot] for slot in order]
        if self.ntk_alpha is not None:
            self.ntk_alpha = self.ntk_alpha[order]
            if not order or bool((self.ntk_alpha == 1).all()):
                self.ntk_alpha = None
        if not order:
            self.layers = []  # the memory is free again
        return order


class RowLayer(CacheLayerMixin):
    """One layer's keys and values: (rows, heads, columns, head_dim), with room for more rows and columns."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, cache: RowCache) -> None:
        self.cache = cache
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Buffers without room, of the type and the place of (rows, heads, tokens, head_dim)."""
        self.keys = key_states.new_zeros(0, key_states.shape[1], 0, key_states.shape[3])
        self.values = value_states.new_zeros(0, value_states.shape[1], 0, value_states.shape[3])
        self.is_initialized = True

    def reserve(self, rows: int, columns: int, *states: torch.Tensor) -> None:
        """Have room for so many rows and columns; both grow by half at least, so that they seldom do."""
        if not self.is_initialized:
            self.lazy_initialization(*states)
        had_rows, heads, had_columns, size = self.keys.shape
        if rows <= had_rows and columns <= had_columns:
            return
        if had_rows:
            rows = had_rows if rows <= had_rows else max(rows, had_rows * 3 // 2)
            columns = had_columns if columns <= had_columns else max(columns, had_columns * 3 // 2)
        columns = -(-columns // COLUMNS) * COLUMNS
        for name in ("keys", "values"):
            old = getattr(self, name)
            # Zeros: what is masked still counts zero times, and zero times NaN is NaN.
            larger = old.new_zeros(rows, heads, columns, size)
            larger[:had_rows, :, :had_columns] = old
            setattr(self, name, larger)

    def put(self, slot: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Copy (heads, tokens, head_dim) into a row."""
        self.keys[slot, :, : key.shape[1]] = key
        self.values[slot, :, : value.shape[1]] = value

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens' (rows, heads, new, head_dim), and return those of all tokens, to `width`."""
        cache, rows, width = self.cache, len(key_states), self.cache.width
        self.reserve(rows, width, key_states, value_states)
        if width == cache.new:  # nothing before them
            self.keys[:rows, :, :width] = key_states
            self.values[:rows, :, :width] = value_states
            return key_states, value_states
        places = cache.places(self.keys.shape[1], self.keys.shape[2], self.keys.device)
        self.keys.flatten(0, 2).index_copy_(0, places, key_states.flatten(0, 2))
        self.values.flatten(0, 2).index_copy_(0, places, value_states.flatten(0, 2))
        return self.keys[:rows, :, :width], self.values[:rows, :, :width]

    def get_seq_length(self) -> int:
        return max(self.cache.starts, default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width, 0

    def get_max_length(self) -> int:
        return -1
