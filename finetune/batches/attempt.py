"""Work that may be too much for the memory, tried."""

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
"""In the messages of RuntimeErrors that mean the same as `torch.OutOfMemoryError`."""


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
