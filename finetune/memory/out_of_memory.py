"""Out of memory in the middle of a run: smaller packs from there on, and the same loss and gradients.

The loss is a sum over supervised tokens, and so are gradients: how a batch is cut into packs changes neither. What is
at stake is what a failed backward leaves behind: it has added to the gradients of some parameters and not to those of
others. To put that right a copy of all gradients would have to be made before every pack (0.45 GB for the published
LoRA), in case it fails. Running the optimizer step anew from its beginning needs nothing in advance: gradients were
empty there, its batches are still in memory (the trainer reads all of a step before it runs the first), and with the
random state put back it becomes the step that it would have been with the lower budget from its start. A failure costs
at most one step's time, and there are only a few before the budget is low enough.
"""

import gc
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from finetune.batches.budget import NOTES, ChosenBudget
from finetune.batches.packing import split_batch
from finetune.errors import Failed
from finetune.run.folder import RunFolder

T = TypeVar("T")
Batch = dict[str, torch.Tensor]

OTHER_ERRORS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""In the messages of RuntimeErrors that mean the same as `torch.OutOfMemoryError`."""

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


class OutOfMemory(NamedTuple):
    """What came of work that did not fit into the memory; `said`, the allocator's own words."""

    said: str


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, of a GPU or of the host."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OTHER_ERRORS)


def attempt(work: Callable[[], T]) -> T | OutOfMemory:
    """What `work` returns, or that it did not fit: then all that it held is free again."""
    try:
        return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        said = ". ".join(re.split(r"\.\s", str(error))[:3]).rstrip(".")
    # Only here: the error has a traceback, this the frames, and they the tensors that filled the memory.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return OutOfMemory(said)


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


class StepInPacks:
    """The optimizer step under way: its batches run pack by pack, and all of them anew when a pack does not fit.

    Args:
        budget: of a pack.
        run_pack: forward and backward of a pack, told whether it is the last one so far; returns the pack's share of
            the step's loss.
        empty_gradients: as they are at the beginning of a step.
        refuse: is called with a pack that does not fit and nothing can be done about; raises what is to be said.
        can_run_anew: whether this process can do so by itself; not where a forward waits for other processes.
        device: of the model.
    """

    def __init__(
        self,
        budget: PackBudget,
        *,
        run_pack: Callable[[Batch, bool], torch.Tensor],
        empty_gradients: Callable[[], None],
        refuse: Callable[[Batch, OutOfMemory], NoReturn],
        can_run_anew: bool = True,
        device: torch.device,
    ):
        self.budget = budget
        self._run_pack, self._empty_gradients, self._refuse = run_pack, empty_gradients, refuse
        self._can_run_anew = can_run_anew
        self._device = device
        self._random = RandomState(device)
        self._batches: list[Batch] = []
        self._told = torch.zeros((), device=device)  # of the step's loss

    def run(self, batch: Batch) -> torch.Tensor:
        """Forward and backward of the step's next batch.

        Returns:
            Its share of the step's loss, () in float32. If the batches before it were run anew, what that changed of
            their shares is in it: the sum over the step is the one of the gradients.
        """
        self._batches.append(batch)
        total = self._told.clone()
        missing: Sequence[Batch] = [batch]
        while isinstance(added := self._run_packs(missing), OutOfMemory):
            self._empty_gradients()
            self._random.put_back()
            total.zero_()
            missing = self._batches
        total += added
        share = total - self._told
        self._told = total
        return share

    def _run_packs(self, batches: Sequence[Batch]) -> torch.Tensor | OutOfMemory:
        """The share of these batches; or that a pack did not fit, and the budget is lower."""
        total = torch.zeros((), device=self._device)
        packs = [pack for batch in batches for pack in split_batch(batch, self.budget.tokens)]
        for number, pack in enumerate(packs, start=1):
            result = attempt(partial(self._run_pack, pack, number == len(packs)))
            if isinstance(result, OutOfMemory):
                lengths = pack["sequence_lengths"]
                if len(lengths) == 1 or not self._can_run_anew:
                    self._refuse(pack, result)
                longest = max(int(batch["sequence_lengths"].max()) for batch in self._batches)
                self.budget.lower(int(lengths.sum()), longest)
                return result
            total += result
        return total


class RandomState:
    """The state of the generators that dropout draws from, on the host and on the device, as of now."""

    def __init__(self, device: torch.device):
        self._device = device
        self._host = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def put_back(self):
        torch.set_rng_state(self._host)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


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
