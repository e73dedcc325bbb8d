"""What the processes of a run agree on in their process group; every call is a collective. One process agrees with
itself."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from finetune.run.trouble import Trouble


def group_device() -> torch.device:
    """Where tensors are that the process group exchanges."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def largest(number: int) -> int:
    """The largest of the numbers of all processes."""
    return largest_of_each([number])[0]


def largest_of_each(numbers: Sequence[int]) -> list[int]:
    """The largest of each number over all processes, which all have as many."""
    return _reduced(numbers, dist.ReduceOp.MAX)


def sum_of_each(numbers: Sequence[int]) -> list[int]:
    """The sum of each number over all processes, which all have as many."""
    return _reduced(numbers, dist.ReduceOp.SUM)


def _reduced(numbers: Sequence[int], operation: Any) -> list[int]:
    if not (dist.is_available() and dist.is_initialized()):
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.int64, device=group_device())
    dist.all_reduce(values, op=operation)
    return values.tolist()


def first_trouble(own: Trouble | None) -> Trouble:
    """What has ended the work of the first process that has some, known to all; at least one has."""
    told: list[Trouble | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, own)
    return next(one for one in told if one is not None)
