"""How many tokens one forward may have, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from finetune.recipe import Data

REPLY_BATCH_TOKENS = 8192
"""Most tokens of a batch of replies, with padding and new ones: 4 GB of keys and values in the published model in 16
bits."""

REPLY_BATCH_ROWS = 64
"""Most replies in one batch."""

ENCODED_TOGETHER = 8
"""Images that the vision tower encodes at once; the published one is no faster with more."""

KEPT_FEATURE_BYTES = 256_000_000
"""Image features that are kept while replies are made: 120 images of the published model in 16 bits."""

NOTES = "out_of_memory"
"""Entry of run.json: the budgets that were lowered, and from which step on."""


@dataclass(frozen=True)
class ChosenBudget:
    """Tokens of one forward.

    Attributes:
        tokens: None where every conversation has a forward of its own.
        reason: in words, where `auto` chose it; else empty.
        lowered: of a resumed run, what was noted of packs that did not fit (see `out_of_memory.PackBudget`).
    """

    tokens: int | None
    reason: str = ""
    lowered: tuple[Mapping[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"up to {self.tokens:,} tokens in one forward: {self.reason}"

    def of_all_processes(self, device: torch.device) -> "ChosenBudget":
        """The lowest of the budgets that the processes of a run chose, each for its own GPU. A collective call."""
        if self.tokens is None or not (dist.is_available() and dist.is_initialized()):
            return self
        lowest = torch.tensor(self.tokens, device=device)
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        return replace(self, tokens=int(lowest))


def packing_budget(data: Data, lengths: np.ndarray) -> int | None:
    """Tokens of one forward by the recipe alone, whatever the memory; None where every conversation has its own."""
    if not data.packing:
        return None
    if isinstance(data.tokens_per_batch, int):
        return data.tokens_per_batch
    return data.max_length or int(lengths.max())
