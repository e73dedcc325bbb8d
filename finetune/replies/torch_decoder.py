"""The decoder in PyTorch: live rows in one batch, each with its own position, adapter and rotary base."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from finetune.replies.decoder import PromptRow
from finetune.replies.masks import attention_mask, takes_masks
from finetune.replies.prefill import prefill
from finetune.replies.row_cache import RowCache
from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration


class TorchDecoder:
    """Computes rows with a model; see `Decoder`.

    Args:
        model: in eval mode, with or without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        assert isinstance(base, QwenVLForConditionalGeneration), f"a {type(base).__name__} is not a Qwen-VL model"
        self._base = base
        self._next = 0
        self._lane = _Lane(base)

    @property
    def context(self) -> int:
        return self._config.max_position_embeddings

    @property
    def most_rows(self) -> None:
        return None

    @property
    def most_tokens(self) -> None:
        return None

    @property
    def _config(self) -> QwenVLConfig:
        return self._base.config

    @torch.no_grad()
    def join(self, rows: Sequence[PromptRow]) -> tuple[list[int], torch.Tensor]:
        numbers = list(range(self._next, self._next + len(rows)))
        self._next += len(rows)
        logits = self._lane.join(numbers, rows)
        return numbers, logits

    @torch.no_grad()
    def step(self, tokens: Mapping[int, int]) -> torch.Tensor:
        return self._lane.step(tokens)

    @torch.no_grad()
    def leave(self, rows: Sequence[int]) -> None:
        self._lane.leave(rows)


class _Lane:
    """Rows that one forward computes."""

    def __init__(self, base: QwenVLForConditionalGeneration) -> None:
        self._base = base
        self._rows: list[int] = []  # the number of the row in each slot of the cache
        self._cache = RowCache()
        self._lengths = torch.empty(0, dtype=torch.long)

    def join(self, numbers: Sequence[int], rows: Sequence[PromptRow]) -> torch.Tensor:
        with takes_masks(self._base.config):
            cache, logits = prefill(self._base, rows)
        if self._rows:
            self._cache.append(cache)
        else:
            self._cache = cache
        self._rows += numbers
        self._rows_changed()
        return logits

    def step(self, tokens: Mapping[int, int]) -> torch.Tensor:
        assert len(tokens) == len(self._rows), "each live row gets a token"
        cache, device = self._cache, self._base.device
        cache.begin(len(self._rows), 1)
        ids = torch.tensor([[tokens[number]] for number in self._rows], device=device)
        positions = self._lengths[:, None]
        mask = None
        if min(cache.lengths) < cache.width - 1:
            mask = attention_mask(positions, cache.width, self._base)
        with takes_masks(self._base.config):
            output = self._base(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        cache.end()
        self._lengths = self._lengths + 1
        logits: torch.Tensor = output.logits[:, 0]
        order = list(tokens)
        if order != self._rows:
            slots = {number: slot for slot, number in enumerate(self._rows)}
            logits = logits[[slots[number] for number in order]]
        return logits

    def leave(self, rows: Sequence[int]) -> None:
        gone = set(rows)
        slots = [slot for slot, number in enumerate(self._rows) if number in gone]
        assert len(slots) == len(gone), "rows that are live"
        order = self._cache.drop(slots)
        self._rows = [self._rows[slot] for slot in order]
        self._rows_changed()

    def _rows_changed(self) -> None:
        self._lengths = torch.tensor(self._cache.lengths, dtype=torch.long, device=self._base.device)
