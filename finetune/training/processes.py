"""What the processes of a distributed run do together: average gradients, stop, and close their process group."""

import atexit
import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from finetune.errors import Failed, Interrupted

_KEPT: list[Any] = []
"""Closed groups, until the process ends. DistributedDataParallel refers to its group. If it is the last to do so, it
destroys it with the GIL held, waiting for gloo's threads; one of these may wait for the GIL, to release the tensors of
the last collective. Python's own reference lets go of the GIL first."""
atexit.register(_KEPT.clear)


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def closing_process_group() -> Iterator[None]:
    """Destroy the process group that was initialised inside, when the work is done or its state is saved.

    If it stays open, threads of the backend outlive the objects they use, and a process that has done everything right
    may end with SIGABRT ("terminate called without an active exception"). A group that existed before belongs to the
    caller. After a failure nothing is closed: other processes may be inside a collective, and closing could wait for
    them forever.
    """
    existed = _is_initialized()
    try:
        yield
    except Interrupted as stopped:
        if stopped.agreed:  # all processes have stopped after the same step
            _destroy_group(existed)
        raise
    _destroy_group(existed)


def _destroy_group(existed: bool) -> None:
    if existed or not _is_initialized():
        return
    _KEPT.append(dist.group.WORLD)
    dist.destroy_process_group()


def keep_closed_groups() -> None:
    """Keep the groups that another program closes, too (see `_KEPT`)."""
    destroy = dist.destroy_process_group

    def destroy_kept(group: Any = None) -> None:
        if _is_initialized():
            _KEPT.append(dist.group.WORLD)
        destroy(group)

    dist.destroy_process_group = destroy_kept


_LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@contextlib.contextmanager
def as_one_process() -> Iterator[None]:
    """Hide a launcher's environment variables: a check of 8 processes' settings starts no group with 7 others."""
    hidden = {name: os.environ.pop(name) for name in _LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def stop_together(failure: Exception | None, device: torch.device) -> None:
    """Stop all processes where one has failed, at a place that all of them reach; a collective call.

    Args:
        failure: of this process; None where all is well.
        device: of the process group's tensors.

    Raises:
        Exception: `failure`.
        Failed: another process has failed.
    """
    failed = torch.tensor(int(failure is not None), device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if failure is not None:
        raise failure
    if failed:
        raise Failed("another process of this run failed, and says why; this one stops with it")


BUCKET_BYTES = 64_000_000
"""Gradients reduced in one all-reduce: large enough for full bandwidth, small enough for a copy."""


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Average the gradients over all processes, in place; all call it with the same parameters.

    DistributedDataParallel overlaps its all-reduce with the last backward, which hides some milliseconds (0.45 GB for
    the published LoRA). But once an all-reduce has started, a backward that runs out of memory can neither be finished
    nor taken back: the other processes wait for the rest of it. This is called after the last backward, when nothing
    can fail any more and each process may have run as many packs as it needed.

    A parameter without a gradient on some processes (a batch of text leaves a trained vision side without) counts as
    zero there. Where no process has one it stays None, as in a run of one process.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return
    has_gradient = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.uint8)
    has_gradient = has_gradient.to(trained[0].device)
    dist.all_reduce(has_gradient, op=dist.ReduceOp.MAX)
    gradients: list[torch.Tensor] = []
    for parameter, somewhere in zip(trained, has_gradient.tolist(), strict=True):
        if somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            # Gradients of embeddings can have gigabytes, and there is no room for a copy.
            dist.all_reduce(bucket[0].div_(dist.get_world_size()))
            continue
        flat = torch.cat([gradient.flatten() for gradient in bucket]).div_(dist.get_world_size())
        dist.all_reduce(flat)
        for gradient, averaged in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(averaged.view_as(gradient))


def _buckets(gradients: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Consecutive gradients of one type, up to `BUCKET_BYTES` (a larger one alone)."""
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
