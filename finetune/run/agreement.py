"""What the processes of a run agree on in their process group; every call is a collective."""

import torch
import torch.distributed as dist

from finetune.run.trouble import Trouble


def group_device() -> torch.device:
    """Where tensors are that the process group exchanges."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def largest(number: int) -> int:
    """The largest of the numbers of all processes."""
    shared = torch.tensor(number, device=group_device())
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def first_trouble(own: Trouble | None) -> Trouble:
    """What has ended the work of the first process that has some, known to all; at least one has."""
    told: list[Trouble | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, own)
    return next(one for one in told if one is not None)
