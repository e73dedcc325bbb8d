"""The loss on the evaluation samples: every process runs its own, and a sharded model the same forwards on all."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from finetune.batches.attempt import OutOfMemory, attempt
from finetune.batches.collate import NO_SAMPLE
from finetune.batches.packing import split_batch
from finetune.errors import UserError
from finetune.memory.out_of_memory import Batch, PackBudget
from finetune.run.agreement import first_trouble, group_device, largest
from finetune.run.trouble import Trouble
from finetune.training.equal_packs import Fillers, equalize
from qwenvl.text.chat import IGNORED

NO_MORE, ONE_MORE, FAILED = range(3)
"""What a process has next; the largest of all processes is what happens."""


def sum_losses(
    batches: Iterable[Batch],
    loss_of_pack: Callable[[Batch], torch.Tensor],
    budget: PackBudget,
    refuse: Callable[[Batch, OutOfMemory], NoReturn],
    *,
    seq_length: int,
    device: torch.device,
    fillers: Fillers | None,
    is_abandoned: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Run this process's evaluation batches.

    Args:
        batches: of this process; others may have more or fewer.
        loss_of_pack: the loss of a pack, summed over its supervised tokens.
        budget: of a pack; lowered where one does not fit.
        refuse: called with a pack that does not fit and cannot be made smaller; raises.
        seq_length: tokens that the model was made for.
        device: of the result.
        fillers: what packs are made alike with where the model is sharded; None where it is not.
        is_abandoned: asked before each pack, or before each batch where the model is sharded; once it is true, this
            process runs no more of its own.

    Returns:
        (4,) float64: the sum of losses, supervised tokens, samples, samples longer than `seq_length`.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    batches = takewhile(lambda _: not is_abandoned(), batches)
    if fillers is None:
        packs = _packs_that_fit(batches, loss_of_pack, budget, refuse)
    else:
        packs = _equal_packs(batches, loss_of_pack, budget, refuse, fillers)
    for pack, loss in packs:
        there = pack["samples"] != NO_SAMPLE
        long = there & (pack["sequence_lengths"] > seq_length)
        counts = [(pack["labels"] != IGNORED).sum(), there.sum(), long.sum()]
        sums += torch.tensor([loss, *counts], dtype=torch.float64, device=device)
        if fillers is None and is_abandoned():
            break
    return sums


def loss_metrics(sums: torch.Tensor, prefix: str, left_out: Path | None) -> dict[str, Any]:
    """What is logged of the sums of all processes.

    Args:
        left_out: the file that lists what cannot be read.

    Raises:
        UserError: no sample could be read.
    """
    if not sums[1]:
        raise UserError(f"evaluate.data: none of its samples can be read now; {left_out or 'the log'} lists them")
    return {
        f"{prefix}_loss": (sums[0] / sums[1]).item(),
        f"{prefix}_supervised_tokens": int(sums[1]),
        f"{prefix}_samples": int(sums[2]),
        f"{prefix}_long_samples": int(sums[3]),
    }


def _packs_that_fit(
    batches: Iterable[Batch],
    loss_of_pack: Callable[[Batch], torch.Tensor],
    budget: PackBudget,
    refuse: Callable[[Batch, OutOfMemory], NoReturn],
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Packs with their losses; smaller packs where they do not fit."""
    for batch in batches:
        packs = split_batch(batch, budget.tokens)
        while packs:
            pack, *others = packs
            loss = attempt(partial(loss_of_pack, pack))
            if not isinstance(loss, OutOfMemory):
                yield pack, loss
                packs = others
                continue
            lengths = pack["sequence_lengths"]
            if len(lengths) == 1:
                refuse(pack, loss)
            budget.lower(int(lengths.sum()), max(int(one["sequence_lengths"].max()) for one in packs))
            packs = [smaller for larger in packs for smaller in split_batch(larger, budget.tokens)]


def _equal_packs(
    batches: Iterable[Batch],
    loss_of_pack: Callable[[Batch], torch.Tensor],
    budget: PackBudget,
    refuse: Callable[[Batch, OutOfMemory], NoReturn],
    fillers: Fillers,
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """As many packs on every process; a forward that fails cannot be run again, as others wait in it."""
    for batch in _in_rounds(batches):
        own = [] if batch is None else split_batch(batch, budget.tokens)
        for pack in equalize(own, fillers, group_device()):
            loss = attempt(partial(loss_of_pack, pack))
            if isinstance(loss, OutOfMemory):
                refuse(pack, loss)
            yield pack, loss


def _in_rounds(batches: Iterable[Batch]) -> Iterator[Batch | None]:
    """Batches, and None once this process has no more, until no process has one.

    Raises:
        BaseException: a batch could not be made; of another process, as `Trouble.error`.
    """
    own = iter(batches)
    while True:
        batch, error = None, None
        try:
            batch = next(own, None)
        except BaseException as raised:
            error = raised
        has = FAILED if error is not None else NO_MORE if batch is None else ONE_MORE
        happens = largest(has)
        if happens == FAILED:
            trouble = first_trouble(None if error is None else Trouble.of(error, dist.get_rank()))
            raise error or trouble.error()
        if happens == NO_MORE:
            return
        yield batch
