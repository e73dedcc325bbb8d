"""Run work that may run out of memory."""

import gc
import re
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")

OTHER_ERRORS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Texts in RuntimeErrors that mean the same as `torch.OutOfMemoryError`."""


class OutOfMemory(NamedTuple):
    """Work did not fit into memory; `said` is the beginning of the allocator's message."""

    said: str


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a GPU or the host is out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OTHER_ERRORS)


def attempt(work: Callable[[], T]) -> T | OutOfMemory:
    """Return what `work` returns, or `OutOfMemory` after freeing what it held."""
    try:
        return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        said = ". ".join(re.split(r"\.\s", str(error))[:3]).rstrip(".")
    # Only after the except clause: until then the error's traceback keeps the frames, and their tensors, alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return OutOfMemory(said)
