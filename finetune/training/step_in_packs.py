"""An optimizer step that runs out of memory is repeated in smaller packs, with the same loss and gradients.

The loss is a sum over supervised tokens, and so are the gradients: how a batch is cut into packs changes neither. But
a backward that fails has added to the gradients of some parameters and not of others. To undo that, all gradients
would have to be copied before every pack (0.45 GB for the published LoRA), in case it fails. Repeating the optimizer
step from its start needs nothing in advance: gradients were empty then, the step's batches are still in memory (the
trainer reads all of them before it runs the first), and with the random state restored it becomes the step that it
would have been with the lower budget. A failure costs at most one step's time, and few of them lower the budget
enough.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import torch

from finetune.batches.attempt import OutOfMemory, attempt
from finetune.batches.packing import split_batch
from finetune.memory.out_of_memory import Batch, PackBudget


class StepInPacks:
    """The current optimizer step: its batches are run pack by pack, and all of them again when a pack does not fit.

    Args:
        budget: of a pack.
        run_pack: runs forward and backward of a pack, with a flag for the last pack; returns the pack's part of the
            step's loss.
        empty_gradients: sets the gradients to what they are at the start of a step.
        refuse: called with a pack that does not fit and cannot be made smaller; raises.
        can_repeat: whether this process can repeat a step by itself; False where the model is sharded.
        equalize: makes the packs of a batch alike on all processes; None leaves them.
        is_abandoned: whether the step will be thrown away: what is left of a batch is not run then.
        device: of the model.
    """

    def __init__(
        self,
        budget: PackBudget,
        *,
        run_pack: Callable[[Batch, bool], torch.Tensor],
        empty_gradients: Callable[[], None],
        refuse: Callable[[Batch, OutOfMemory], NoReturn],
        can_repeat: bool = True,
        equalize: Callable[[list[Batch]], list[Batch]] | None = None,
        is_abandoned: Callable[[], bool] = lambda: False,
        device: torch.device,
    ):
        self.budget = budget
        self._run_pack, self._empty_gradients, self._refuse = run_pack, empty_gradients, refuse
        self._can_repeat, self._equalize, self._is_abandoned = can_repeat, equalize, is_abandoned
        self._device = device
        self._random = RandomState(device)
        self._batches: list[Batch] = []
        self._returned = torch.zeros((), device=device)  # of the step's loss

    def run(self, batch: Batch) -> torch.Tensor:
        """Run forward and backward of the step's next batch.

        Returns:
            Its part of the step's loss, () in float32. If earlier batches were run again, the change of their parts is
            included: the parts add up to the loss that the gradients belong to.
        """
        self._batches.append(batch)
        total = self._returned.clone()
        missing: Sequence[Batch] = [batch]
        while isinstance(added := self._run_packs(missing), OutOfMemory):
            self._empty_gradients()
            self._random.restore()
            total.zero_()
            missing = self._batches
        total += added
        part = total - self._returned
        self._returned = total
        return part

    def _run_packs(self, batches: Sequence[Batch]) -> torch.Tensor | OutOfMemory:
        """Return the part of these batches; or that a pack did not fit, and the budget is lower now."""
        total = torch.zeros((), device=self._device)
        packs = [pack for batch in batches for pack in split_batch(batch, self.budget.tokens)]
        if self._equalize is not None:
            packs = self._equalize(packs)
        for number, pack in enumerate(packs, start=1):
            if self._is_abandoned():
                break
            result = attempt(partial(self._run_pack, pack, number == len(packs)))
            if isinstance(result, OutOfMemory):
                lengths = pack["sequence_lengths"]
                if len(lengths) == 1 or not self._can_repeat:
                    self._refuse(pack, result)
                longest = max(int(batch["sequence_lengths"].max()) for batch in self._batches)
                self.budget.lower(int(lengths.sum()), longest)
                return result
            total += result
        return total


class RandomState:
    """The state of the generators that dropout uses, on the host and on the device, when this object was made."""

    def __init__(self, device: torch.device):
        self._device = device
        self._host = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Set the generators back to that state."""
        torch.set_rng_state(self._host)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
