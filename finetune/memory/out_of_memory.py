"""Out of memory in the middle of a run: the budget of a pack is lowered, and noted in run.json."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from finetune.batches.budget import NOTES, ChosenBudget
from finetune.errors import Failed
from finetune.run.folder import RunFolder

Batch = dict[str, torch.Tensor]


NOTHING = torch.iinfo(torch.int64).max
"""Tokens of the smallest pack that did not fit, where all did."""


class DoesNotFit(Failed):
    """A pack is too much for the memory, and cannot be made smaller; the message says what would help.

    Args:
        what: the samples, by file and row.
        when: in the run.
        conversations, tokens: of the pack. One conversation is never cut; several are not where processes share the
            model, as these wait for one another in every forward.
        said: the allocator's own words.
    """

    def __init__(self, *, what: str, when: str, conversations: int, tokens: int, said: str):
        if conversations == 1:
            problem = "one conversation by itself is too much for the memory"
            remedy = (
                "train.checkpointing: full (or offload), model.quantization: nf4, train.optim: paged_adamw_8bit, a "
                f"smaller adapter.r, or data.max_length below {tokens:,} with data.on_long: drop or drop_turns"
            )
        else:
            problem = "where processes share the model, a step cannot be run anew in smaller packs by one of them"
            remedy = f"data.tokens_per_batch: {tokens // 2}; the same command goes on from the last checkpoint"
        super().__init__(f"out of memory {when}, with {what}: {problem}. What helps: {remedy}\n({said})")


class PackBudget:
    """Most tokens of one forward. A pack that does not fit lowers it for the rest of the run.

    Args:
        metric: what it is logged as.
        tokens: at the beginning; None runs every sequence by itself.
        noted: what the earlier parts of a resumed run logged, as `take_news` returns it, with `step`. From these steps
            on the budget is low already: the run goes on as it would have gone without the interruption.

    Attributes:
        tokens: as of now.
    """

    def __init__(self, metric: str, tokens: int | None, noted: Sequence[Mapping[str, Any]] = ()):
        self.metric = metric
        self.tokens = tokens
        self._noted = [(note["step"], note[metric]) for note in noted if metric in note]
        self._too_many: int | None = None

    def reach(self, step: int):
        """Before optimizer step `step`, from 1."""
        if self.tokens is not None:
            self.tokens = min([self.tokens, *(tokens for since, tokens in self._noted if since <= step)])

    def lower(self, pack_tokens: int, longest: int):
        """After a pack of several sequences did not fit.

        Half of it, so that a few failures are enough; but the longest sequence at hand has to be run anyhow, and packs
        of its length with it. Where that would leave the failed pack whole (its images or supervised tokens made it
        larger than a longer sequence) the half it is.

        Args:
            pack_tokens: of the failed pack.
            longest: tokens of the longest sequence of the batches at hand.
        """
        half = pack_tokens // 2
        self.tokens = max(half, longest) if longest < pack_tokens else half
        self._too_many = min(self._too_many or pack_tokens, pack_tokens)

    def take_news(self, device: torch.device) -> dict[str, int] | None:
        """For the log, after the step: what was lowered since the last call; None if nothing was.

        All processes call it together, and go on with the lowest of their budgets: the main one notes it for them.

        Returns:
            The budget by the metric's name, and `out_of_memory_tokens`, those of the (smallest) pack that did not fit.
        """
        if self.tokens is None:  # a forward has one sequence, and nothing can be lowered
            return None
        too_many = self._too_many or NOTHING
        if dist.is_available() and dist.is_initialized():
            lowest = torch.tensor([self.tokens, too_many], device=device)
            dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
            self.tokens, too_many = lowest.tolist()
        self._too_many = None
        return None if too_many == NOTHING else {self.metric: self.tokens, "out_of_memory_tokens": too_many}


class NoteBudgets(TrainerCallback):
    """Writes the budget, and each lower one, into run.json, from where a resumed run takes them.

    Args:
        description: what run.json says; added to.
        budget: of the run.
    """

    def __init__(self, run: RunFolder, description: dict[str, Any], budget: ChosenBudget):
        self.run, self.description, self.budget = run, description, budget

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.description |= {"tokens_per_batch": self.budget.tokens, NOTES: list(self.budget.lowered)}
            self.run.write_run(self.description)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and "out_of_memory_tokens" in logs:
            note = {"step": state.global_step} | {key: tokens for key, tokens in logs.items() if "tokens" in key}
            self.description[NOTES].append(note)
            self.run.write_run(self.description)
