"""Out of memory in the middle of a run: smaller packs from there on, and the same loss and gradients.

The loss is a sum over supervised tokens, and so are gradients: how a batch is cut into packs changes neither. What is
at stake is what a failed backward leaves behind: it has added to the gradients of some parameters and not to those of
others. To put that right a copy of all gradients would have to be made before every pack (0.45 GB for the published
LoRA), in case it fails. Running the optimizer step anew from its beginning needs nothing in advance: gradients were
empty there, its batches are still in memory (the trainer reads all of a step before it runs the first), and with the
random state put back it becomes the step that it would have been with the lower budget from its start. A failure costs
at most one step's time, and there are only a few before the budget is low enough.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import torch

from finetune.batches.attempt import OutOfMemory, attempt
from finetune.batches.packing import split_batch
from finetune.memory.out_of_memory import Batch, PackBudget


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
