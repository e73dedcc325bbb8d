"""The budget of a pack, lowered when a pack does not fit into the memory; and the error when it cannot be lowered."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from finetune.errors import Failed

Batch = dict[str, torch.Tensor]

NONE_FAILED = torch.iinfo(torch.int64).max
"""Stands for the tokens of the smallest pack that did not fit, where all packs did."""


class DoesNotFit(Failed):
    """A pack is too large for the memory and cannot be made smaller; the message says what would help.

    Args:
        what: the samples, by file and row.
        when: in the run.
        conversations, tokens: of the pack. A single conversation is never cut. A pack of several cannot be cut where
            the model is sharded, as every process waits for the others in each forward.
        said: the allocator's own message.
        shared: whether processes share the model.
    """

    def __init__(self, *, what: str, when: str, conversations: int, tokens: int, said: str, shared: bool = False):
        if conversations == 1 and shared:
            problem = "one conversation by itself is too much for the memory"
            remedy = (
                "train.checkpointing: full (or offload), more GPUs, or data.max_length below "
                f"{tokens:,} with data.on_long: drop or drop_turns"
            )
        elif conversations == 1:
            problem = "one conversation by itself is too much for the memory"
            remedy = (
                "train.checkpointing: full (or offload), model.quantization: nf4, train.optim: paged_adamw_8bit, a "
                f"smaller adapter.r, or data.max_length below {tokens:,} with data.on_long: drop or drop_turns"
            )
        else:
            problem = "where processes share the model, one of them cannot repeat a step in smaller packs"
            remedy = f"data.tokens_per_batch: {tokens // 2}; the same command goes on from the last checkpoint"
        super().__init__(f"out of memory {when}, with {what}: {problem}. What helps: {remedy}\n({said})")


class PackBudget:
    """The most tokens of one forward. A pack that does not fit lowers it for the rest of the run.

    Args:
        metric: the name under which it is logged.
        tokens: at the start; None runs every sequence by itself.
        noted: what earlier parts of a resumed run logged, as `take_news` returns it, with `step`. From these steps on
            the budget is lower already, so that the resumed run computes what an uninterrupted one would have.

    Attributes:
        tokens: the budget now.
    """

    def __init__(self, metric: str, tokens: int | None, noted: Sequence[Mapping[str, Any]] = ()):
        self.metric = metric
        self.tokens = tokens
        self._noted: list[tuple[int, int]] = [(note["step"], note[metric]) for note in noted if metric in note]
        self._too_many: int | None = None

    def reach(self, step: int) -> None:
        """To be called before optimizer step `step`, counted from 1."""
        if self.tokens is not None:
            self.tokens = min([self.tokens, *(tokens for since, tokens in self._noted if since <= step)])

    def lower(self, pack_tokens: int, longest: int) -> None:
        """To be called after a pack of several sequences did not fit.

        The new budget is half the pack, so that few failures are enough. But the longest sequence at hand has to be
        run in any case, and packs of its length with it. Where that would leave the failed pack whole (its images or
        supervised tokens made it larger than a longer sequence), the budget is the half.

        Args:
            pack_tokens: of the failed pack.
            longest: tokens of the longest sequence of the batches at hand.
        """
        half = pack_tokens // 2
        self.tokens = max(half, longest) if longest < pack_tokens else half
        self._too_many = min(self._too_many or pack_tokens, pack_tokens)

    def take_news(self, device: torch.device) -> dict[str, float] | None:
        """Return what was lowered since the last call, for the log; None if nothing was.

        All processes call it together and go on with the lowest of their budgets.

        Returns:
            The budget by the metric's name, and `out_of_memory_tokens`, those of the smallest pack that did not fit.
        """
        if self.tokens is None:  # a forward has one sequence, and nothing can be lowered
            return None
        too_many = self._too_many or NONE_FAILED
        if dist.is_available() and dist.is_initialized():
            lowest = torch.tensor([self.tokens, too_many], device=device)
            dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
            self.tokens, too_many = int(lowest[0]), int(lowest[1])
        self._too_many = None
        return None if too_many == NONE_FAILED else {self.metric: self.tokens, "out_of_memory_tokens": too_many}
