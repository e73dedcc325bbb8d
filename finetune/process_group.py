"""The processes of a run part at its end, and none is left talking."""

import contextlib
from collections.abc import Iterator

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
