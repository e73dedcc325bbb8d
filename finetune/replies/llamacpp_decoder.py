"""The decoder of replies on llama.cpp: rows are sequences, and what they have in common is computed once."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from finetune.errors import UserError
from finetune.llamacpp.language_model import LanguageModel, Positions
from finetune.llamacpp.prompts import ImagePlace, image_places, prefill
from finetune.replies.decoder import PromptRow
from qwenvl import QwenVLConfig


@dataclass
class _Sequence:
    """What a sequence of llama.cpp holds.

    Attributes:
        keys: what each position was computed from: a token, or an image's key and the place in it.
        cells: where its keys and values are, each by a number that is never used twice.
    """

    keys: list[Hashable]
    cells: list[int]


class LlamaCppDecoder:
    """Rows on a language model of llama.cpp; see `finetune.replies.decoder.Decoder`.

    A row that has left is kept for prompts that begin as it does, until its cells or its sequence are needed.

    Args:
        model: runs the rows, and nothing else.
        config: of the source.
        rows: most live rows.
        sequences: of the model, at least as many as rows; the others are for rows that have left.
    """

    def __init__(self, model: LanguageModel, config: QwenVLConfig, *, rows: int, sequences: int) -> None:
        assert 1 <= rows <= sequences, f"{rows} rows in {sequences} sequences"
        self._model, self._config, self._rows = model, config, rows
        self._free = list(reversed(range(sequences)))
        self._live: dict[int, tuple[int, _Sequence]] = {}  # by the row's number: sequence number, and what it holds
        self._kept: dict[int, _Sequence] = {}  # by sequence number, the least recently used first
        self._users: Counter[int] = Counter()  # of each cell: how many sequences have it
        self._numbers, self._new_cells = count(), count()
        self._reused: list[int] = []

    @property
    def context(self) -> int:
        return self._config.seq_length

    @property
    def most_rows(self) -> int:
        return self._rows

    @property
    def most_tokens(self) -> int:
        return self._model.cells

    @property
    def reused(self) -> list[int]:
        return self._reused

    def join(self, rows: Sequence[PromptRow]) -> tuple[list[int], torch.Tensor]:
        """See `Decoder.join`.

        Raises:
            InputError: a prompt that is longer than the context, with an adapter, or with other images than features.
            torch.OutOfMemoryError: there are not so many rows or cells.
        """
        images = [self._checked(row) for row in rows]
        if len(self._live) + len(rows) > self._rows:
            raise torch.OutOfMemoryError(f"llama.cpp is opened for {self._rows} rows at a time")
        numbers: list[int] = []
        logits = []
        self._reused = []
        try:
            for row, places in zip(rows, images, strict=True):
                number, found = self._join(row, places)
                numbers.append(number)
                logits.append(found)
            together = torch.stack(logits)
        except BaseException:
            for number in numbers:
                self._remove(*self._live.pop(number))
            raise
        return numbers, together

    def step(self, tokens: Mapping[int, int]) -> torch.Tensor:
        """See `Decoder.step`.

        Raises:
            UserError: a row has the length of the context.
            torch.OutOfMemoryError: there are not so many cells. Nothing has changed then.
        """
        assert tokens.keys() == self._live.keys(), "a token for each live row"
        rows = [self._live[number] for number in tokens]
        if any(len(held.keys) >= self.context for _, held in rows):
            raise UserError(f"a prompt and its reply have {self.context:,} tokens: llama.cpp takes no more")
        self._make_room(len(rows))
        at = Positions([len(held.keys) for _, held in rows], [number for number, _ in rows], range(len(rows)))
        logits = self._model.decode_tokens(list(tokens.values()), at)
        for (_, held), token in zip(rows, tokens.values(), strict=True):
            self._grow(held, [token])
        return logits

    def leave(self, rows: Sequence[int]) -> None:
        """See `Decoder.leave`."""
        for row in rows:
            number, held = self._live.pop(row)
            self._kept[number] = held

    def drop_kept(self) -> bool:
        """See `Decoder.drop_kept`."""
        had = bool(self._kept)
        while self._kept:
            self._remove(*self._kept.popitem())
        return had

    def _checked(self, row: PromptRow) -> list[ImagePlace]:
        if row.adapter is not None:
            raise UserError(f"llama.cpp runs no adapters, and {row.adapter} is one: merge it, and export that")
        if len(row.ids) > self.context:
            raise UserError(f"the prompt has {len(row.ids):,} tokens, and llama.cpp takes {self.context:,}")
        return image_places(row.ids, row.features, self._config)

    def _join(self, row: PromptRow, images: Sequence[ImagePlace]) -> tuple[int, torch.Tensor]:
        keys = _keys(row, images)
        donor, shared = self._longest_prefix(keys)
        if donor in self._kept:  # the most recently used
            self._kept[donor] = self._kept.pop(donor)
        number = self._free_sequence(but=donor)
        if number is None:  # the donor is the only one that can be had: it goes on as the row
            assert donor is not None, "with another row live there would be a sequence that is free"
            number, held = donor, self._kept.pop(donor)
            self._shorten(number, held, shared)
        else:
            held = _Sequence([], [])
            if donor is not None and shared:
                known = self._held(donor)
                self._model.copy(donor, number, shared)
                held = _Sequence(known.keys[:shared], known.cells[:shared])
                self._users.update(held.cells)
        try:
            self._make_room(len(keys) - shared)
            logits = prefill(self._model, number, row.ids, images, shared)
        except BaseException:
            self._remove(number, held)
            raise
        self._grow(held, keys[shared:])
        self._reused.append(shared)
        row_number = next(self._numbers)
        self._live[row_number] = number, held
        return row_number, logits

    def _held(self, sequence: int) -> _Sequence:
        if sequence in self._kept:
            return self._kept[sequence]
        return next(held for number, held in self._live.values() if number == sequence)

    def _longest_prefix(self, keys: Sequence[Hashable]) -> tuple[int | None, int]:
        """The sequence that begins most as a prompt does, and how much of the prompt, but its last token, it has."""
        donor, longest = None, 0
        for number, held in [*self._kept.items(), *self._live.values()]:
            length, most = 0, min(len(held.keys), len(keys) - 1)
            if most <= longest or held.keys[: longest + 1] != keys[: longest + 1]:
                continue
            length = longest + 1
            while length < most and held.keys[length] == keys[length]:
                length += 1
            donor, longest = number, length
        return donor, longest

    def _free_sequence(self, but: int | None) -> int | None:
        """A sequence without cells; a kept one is given up for it, but not the one that is to be copied."""
        if not self._free:
            oldest = next((number for number in self._kept if number != but), None)
            if oldest is None:
                return None
            self._remove(oldest, self._kept.pop(oldest))
        return self._free.pop()

    def _make_room(self, cells: int) -> None:
        """Give up kept sequences until so many cells are free.

        Raises:
            torch.OutOfMemoryError: there are not so many, though none is kept.
        """
        while self._model.cells - len(self._users) < cells:
            if not self._kept:
                raise torch.OutOfMemoryError(
                    f"llama.cpp has {self._model.cells:,} tokens of memory, {len(self._users):,} are in use, and "
                    f"{cells:,} more are needed"
                )
            oldest = next(iter(self._kept))
            self._remove(oldest, self._kept.pop(oldest))

    def _grow(self, held: _Sequence, keys: Sequence[Hashable]) -> None:
        cells = [next(self._new_cells) for _ in keys]
        held.keys += keys
        held.cells += cells
        self._users.update(cells)

    def _shorten(self, number: int, held: _Sequence, length: int) -> None:
        self._model.remove(number, length)
        self._drop(held.cells[length:])
        del held.keys[length:], held.cells[length:]

    def _remove(self, number: int, held: _Sequence) -> None:
        """End a sequence, whose number is free then."""
        self._model.remove(number)
        self._drop(held.cells)
        self._free.append(number)

    def _drop(self, cells: Sequence[int]) -> None:
        for cell in cells:
            self._users[cell] -= 1
            if not self._users[cell]:
                del self._users[cell]


def _keys(row: PromptRow, images: Sequence[ImagePlace]) -> list[Hashable]:
    """What each position of a prompt is computed from. Images without keys are equal to no others."""
    keys: list[Hashable] = list(row.ids)
    for index, image in enumerate(images):
        key = row.image_keys[index] if row.image_keys else object()
        keys[image.start : image.stop] = [(key, place) for place in range(image.stop - image.start)]
    return keys
