"""The decoder in PyTorch: live rows in one batch, each with its own position, adapter and rotary base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from finetune.batches.attempt import is_out_of_memory
from finetune.replies.decoder import PromptRow
from finetune.replies.masks import attention_mask
from finetune.replies.prefill import prefill
from finetune.replies.prefix_store import PrefixStore
from finetune.replies.prompt_tokens import BLOCK, ComparedTokens, image_starts, without_half_image
from finetune.replies.row_cache import KeysAndValues, RowCache, tokens_of
from finetune.replies.row_forward import RowForward


class TorchDecoder:
    """Computes rows with a model; see `Decoder`.

    What a prompt begins with is not computed again where a live row, or a prompt that joins with it, begins with the
    same tokens and images. Rows whose adapters PEFT computes beside each other are in one batch; others have one for
    each adapter.

    Args:
        model: in eval mode, with or without adapters. Where rows name adapters, none is active between calls.
        prefix_bytes: of keys and values of rows that have left, kept for prompts that begin as they do; 0 for none.
        context: most tokens of a row; None for the model's `max_position_embeddings`.
    """

    def __init__(self, model: nn.Module, *, prefix_bytes: int = 0, context: int | None = None) -> None:
        self._forward = RowForward(model)
        self._store = PrefixStore(prefix_bytes)
        self._context = context or self._forward.config.max_position_embeddings
        self._lanes: dict[str | None, _Lane] = {}
        self._lane_of: dict[int, _Lane] = {}
        self._next = 0
        self._reused: list[int] = []

    @property
    def context(self) -> int:
        return self._context

    @property
    def most_rows(self) -> None:
        return None

    @property
    def most_tokens(self) -> None:
        return None

    @property
    def reused(self) -> list[int]:
        return self._reused

    @torch.no_grad()
    def join(self, rows: Sequence[PromptRow]) -> tuple[list[int], torch.Tensor]:
        lanes = [self._forward.lane(row.adapter) for row in rows]
        compared = [self._compared(row) for row in rows]
        known = [self._known(row, tokens) for row, tokens in zip(rows, compared, strict=True)]
        computed = []
        for lane in dict.fromkeys(lanes):
            own = [index for index, of_row in enumerate(lanes) if of_row == lane]
            for part in prefill(self._forward, [rows[index] for index in own], [known[index] for index in own]):
                computed.append((lane, [own[index] for index in part.indices], part.cache, part.logits))
        # Before any row joins: what allocates memory may fail.
        order = torch.tensor([index for _, indices, _, _ in computed for index in indices]).argsort()
        logits = torch.cat([logits for _, _, _, logits in computed])
        logits = logits[order.to(logits.device)]
        numbers = list(range(self._next, self._next + len(rows)))
        self._next += len(rows)
        joined: list[int] = []
        try:
            for lane, indices, cache, _ in computed:
                live = self._lanes.setdefault(lane, _Lane(self._forward))
                live.add(
                    [
                        _LiveRow(number, rows[index].adapter, list(rows[index].ids), rows[index].image_keys, tokens)
                        for index in indices
                        for number, tokens in [(numbers[index], compared[index])]
                    ],
                    cache,
                )
                joined += [numbers[index] for index in indices]
                self._lane_of |= dict.fromkeys([numbers[index] for index in indices], live)
        except BaseException:
            self.leave(joined)
            raise
        self._reused = [0 if row is None else tokens_of(row) for row in known]
        return numbers, logits

    @torch.no_grad()
    def step(self, tokens: Mapping[int, int]) -> torch.Tensor:
        assert tokens.keys() == self._lane_of.keys(), "each live row gets a token"
        lanes = [lane for lane in self._lanes.values() if lane.rows]
        logits = [lane.compute(tokens) for lane in lanes]
        order = [row.number for lane in lanes for row in lane.rows]
        together = torch.cat(logits) if len(logits) > 1 else logits[0]
        if order != list(tokens):
            places = {number: place for place, number in enumerate(order)}
            together = together[[places[number] for number in tokens]]
        for lane in lanes:  # only now, when nothing has failed or can
            lane.advance(tokens)
        return together

    @torch.no_grad()
    def leave(self, rows: Sequence[int]) -> None:
        gone = set(rows)
        lanes = {id(lane): lane for lane in map(self._lane_of.__getitem__, gone)}
        for lane in lanes.values():
            lane.remove(gone, self._store)
        self._lanes = {name: lane for name, lane in self._lanes.items() if lane.rows}
        for number in gone:
            del self._lane_of[number]

    def drop_kept(self) -> bool:
        return self._store.clear()

    def forget(self, adapter: str) -> None:
        """Drop what is kept of an adapter that goes; none of its rows is live."""
        self._store.forget(adapter)

    def _compared(self, row: PromptRow) -> ComparedTokens | None:
        """None for a row that shares nothing: beyond seq_length the rotary base depends on the whole row's length."""
        if len(row.ids) > self._forward.config.seq_length or len(row.image_keys) != len(row.features):
            return None
        return ComparedTokens(row.ids, row.image_keys, row.adapter, self._forward.config)

    def _known(self, row: PromptRow, tokens: ComparedTokens | None) -> KeysAndValues | None:
        """What is known of the beginning of a row, by live rows and those that have left."""
        if tokens is None:
            return None
        count, found = self._store.longest(tokens)
        for lane in self._lanes.values():
            for slot, live in enumerate(lane.rows):
                if live.compared is not None and (common := tokens.common(live.compared)) > count:
                    count, found = common, lane.cache.row(slot)
        count = without_half_image(row.ids, min(count, len(row.ids) - 1), self._forward.config)
        if count < BLOCK:
            return None
        return [(key[:, :count], value[:, :count]) for key, value in found]


@dataclass
class _LiveRow:
    """What is known of a row besides its keys and values.

    Attributes:
        ids: of the prompt and of the tokens given since.
        compared: of the prompt; None where it shares nothing.
    """

    number: int
    adapter: str | None
    ids: list[int]
    image_keys: Sequence[str]
    compared: ComparedTokens | None


class _Lane:
    """Rows that one forward computes."""

    def __init__(self, forward: RowForward) -> None:
        self._forward = forward
        self.rows: list[_LiveRow] = []  # in each slot of the cache
        self.cache = RowCache()
        self._lengths: torch.Tensor | None = None  # on the device; None where rows have come or gone

    def add(self, rows: Sequence[_LiveRow], cache: RowCache) -> None:
        """Rows join, with their prompts' keys and values."""
        if self.rows:
            self.cache.append(cache)
        else:
            self.cache = cache
        self.rows += rows
        self._lengths = None

    def compute(self, tokens: Mapping[int, int]) -> torch.Tensor:
        """(rows, vocabulary) logits after the rows' next tokens, which `advance` makes part of them."""
        cache, device = self.cache, self._forward.device
        cache.begin(len(self.rows), 1)
        if self._lengths is None:
            self._lengths = torch.tensor(cache.lengths, device=device)
        positions = self._lengths[:, None]
        mask = None
        if min(cache.lengths) < cache.width - 1:
            mask = attention_mask(positions, cache.width, self._forward.config, self._forward.dtype)
        return self._forward(
            [row.adapter for row in self.rows],
            input_ids=torch.tensor([[tokens[row.number]] for row in self.rows], device=device),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def advance(self, tokens: Mapping[int, int]) -> None:
        assert self._lengths is not None, "they were computed"
        self.cache.end()
        self._lengths += 1  # in place: no memory is asked for
        for row in self.rows:
            row.ids.append(tokens[row.number])

    def remove(self, gone: set[int], store: PrefixStore) -> None:
        """Rows leave; their keys and values go into the store."""
        slots = [slot for slot, row in enumerate(self.rows) if row.number in gone]
        for slot in slots:
            try:
                self._keep(slot, store)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                store.clear()  # rows leave in any case
        order = self.cache.drop(slots)
        self.rows = [self.rows[slot] for slot in order]
        self._lengths = None

    def _keep(self, slot: int, store: PrefixStore) -> None:
        row, config = self.rows[slot], self._forward.config
        if not store.most_bytes or row.compared is None:
            return
        ids = row.ids[: config.seq_length]
        if len(image_starts(ids, config)) != len(row.image_keys):
            return  # the model has spelled an image
        tokens = ComparedTokens(ids, row.image_keys, row.adapter, config)
        store.keep(tokens, [(key[:, : len(ids)], value[:, : len(ids)]) for key, value in self.cache.row(slot)])
