"""The location of a tensor in a checkpoint's file, and its values read from there."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from qwenvl.checkpoint.direct_reading import SLACK, read_direct, read_through_cache
from qwenvl.errors import InputError


@dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor in a file.

    Reading the tensor, or some of its rows, takes only their bytes of memory, while the pages of a memory-mapped file
    would count as resident once read.

    Attributes:
        offset: of its first value, in bytes from the file's beginning.
        stride: in values; pickled files may hold transposed tensors.
    """

    name: str
    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def strided(self) -> bool:
        """Whether its values are stored in another order than row-major."""
        return self.stride != tuple(prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))

    def read(self, start: int = 0, stop: int | None = None, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read the tensor, or its rows (along the first axis) from `start` to before `stop`.

        Args:
            into: memory to read into (uint8, on the CPU, `direct_reading.SLACK` bytes longer than what is read); the
                result is then a view of it. Reused memory is several times faster than newly allocated memory, which
                the system must clear first.

        Raises:
            InputError: the file is shorter than it should be, or cannot be read.
        """
        shape = self.shape
        if shape:
            shape = (max(min(shape[0] if stop is None else stop, shape[0]) - start, 0), *shape[1:])
        if 0 in shape:
            return torch.empty(shape, dtype=self.dtype)
        first = start * self.stride[0] if shape else 0
        span = 1 + sum((size - 1) * step for size, step in zip(shape, self.stride, strict=True))
        size = span * self.dtype.itemsize
        memory = torch.empty(size + SLACK, dtype=torch.uint8) if into is None else into
        return self._values(first, span, memory).as_strided(shape, self.stride)

    def flat(
        self, start: int, stop: int, into: torch.Tensor | None = None, *, page_cache: bool = False
    ) -> torch.Tensor:
        """Read values `start` to before `stop` of the flattened tensor.

        Args:
            into: as `read`; not used for a strided tensor, which is read whole.
            page_cache: use the system's page cache; see `direct_reading`.

        Raises:
            InputError: as `read`.
        """
        stop = min(stop, prod(self.shape))
        if self.strided:
            return self.read().reshape(-1)[start:stop]
        if start >= stop:
            return torch.empty(0, dtype=self.dtype)
        size = (stop - start) * self.dtype.itemsize
        memory = torch.empty(size + SLACK, dtype=torch.uint8) if into is None else into
        return self._values(start, stop - start, memory, read_through_cache if page_cache else read_direct)

    def _values(
        self,
        first: int,
        count: int,
        memory: torch.Tensor,
        read: Callable[[Path, int, int, torch.Tensor], torch.Tensor] = read_direct,
    ) -> torch.Tensor:
        """(count,) values from index `first` on, in the order of the file."""
        place, size = self.offset + first * self.dtype.itemsize, count * self.dtype.itemsize
        try:
            content = read(self.file, place, size, memory)
        except EOFError as error:
            raise InputError(f"{self.file} ends before {self.name} does: it is cut short, fetch it again") from error
        except OSError as error:
            raise InputError(f"{self.file} cannot be read ({error.strerror}): check it and its disk") from error
        # After tensors of bytes, others may start at an offset that is no multiple of their type's size.
        if content.storage_offset() % self.dtype.itemsize:
            content = content.clone()
        return content.view(self.dtype)
