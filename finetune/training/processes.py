"""The processes of a run part at its end, and none is left talking."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from finetune.errors import Interrupted


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def parting_at_the_end() -> Iterator[None]:
    """Close the process group that was opened within, once its work is done or saved.

    Left open, threads of its backend outlive what they work on, and a process that has done everything right may end
    by SIGABRT ("terminate called without an active exception"). A group that was there before is its owner's. After a
    failure nothing is closed: the others may be in the midst of an exchange, and closing could wait for them forever.
    """
    was_there = _joined()
    try:
        yield
    except Interrupted as stopped:
        if stopped.saved:  # all have stopped after the same step
            _part(was_there)
        raise
    _part(was_there)


def _part(was_there: bool) -> None:
    if not was_there and _joined():
        dist.destroy_process_group()


BUCKET_BYTES = 64_000_000
"""Exchanged at once: large enough for the speed of the wire, small enough not to need memory of its own."""


def average_gradients(parameters: Iterable[torch.nn.Parameter]):
    """Average the gradients over all processes, in place; all call it with the same parameters.

    A parameter without a gradient on some processes (a batch of text alone leaves a trained vision side without)
    counts as zero there. Where none has one it stays without, as in a run of one process.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if not parameters:
        return
    has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    has = has.to(parameters[0].device)
    dist.all_reduce(has, op=dist.ReduceOp.MAX)
    gradients = []
    for parameter, is_there in zip(parameters, has.tolist(), strict=True):
        if is_there:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            # Embeddings can have gradients of gigabytes, of which there is no room for a copy.
            dist.all_reduce(bucket[0].div_(dist.get_world_size()))
            continue
        flat = torch.cat([gradient.flatten() for gradient in bucket]).div_(dist.get_world_size())
        dist.all_reduce(flat)
        for gradient, averaged in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(averaged.view_as(gradient))


def _buckets(gradients: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one type, up to `BUCKET_BYTES` (a larger one alone)."""
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (gradient.dtype != bucket[0].dtype or size + gradient.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket
