"""Tensors copied from one checkpoint into another: renamed, cut, rounded at most once; and compared afterwards."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.errors import Failed, UserError
from finetune.files.tensor_files import Planned, file_hash
from qwenvl.checkpoint.checkpoint_files import StoredTensor, tensors_in
from qwenvl.checkpoint.fingerprint import weights_fingerprint

PIECE_BYTES = 1 << 26  # read at once
SAMPLED = 16  # tensors of which every value is computed once more, evenly from first to last


@dataclass(frozen=True)
class ExportedTensor:
    """A tensor to be written and what it is made of.

    Attributes:
        name: in the checkpoint that is written.
        source: the tensor that it is, or is cut out of.
        dtype: that it is written in.
        rows: (start, stop) along the source's first axis; None for all of it.
    """

    name: str
    source: StoredTensor
    dtype: torch.dtype
    rows: tuple[int, int] | None = None

    @property
    def planned(self) -> Planned:
        shape = self.source.shape
        if self.rows is not None:
            shape = (self.rows[1] - self.rows[0], *shape[1:])
        return Planned(self.name, shape, self.dtype)

    def pieces(self) -> Iterator[torch.Tensor]:
        """The tensor, cut along its first axis.

        Raises:
            UserError: a value that the written type cannot hold.
        """
        if not self.source.shape:
            yield self._rounded(self.source.read())
            return
        start, stop = self.rows or (0, self.source.shape[0])
        step = max(1, PIECE_BYTES * self.source.shape[0] // max(1, self.source.nbytes))
        for first in range(start, stop, step):
            yield self._rounded(self.source.read(first, min(first + step, stop)))

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        rounded = values.to(self.dtype)
        if self.dtype != values.dtype and (rounded.isinf() & ~values.isinf()).any():
            finite = values[~values.isinf()]
            raise UserError(
                f"{self.source.name}: {finite.abs().max():.3g} is more than {dtype_name(self.dtype)} can hold "
                f"({torch.finfo(self.dtype).max:.5g}): give --dtype bfloat16 or float32"
            )
        return rounded


def planned(tensors: Sequence[ExportedTensor]) -> list[Planned]:
    """As `tensor_files.write_tensors` takes them."""
    return [tensor.planned for tensor in tensors]


def pieces(tensors: Sequence[ExportedTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """As `tensor_files.write_tensors` takes them."""
    for tensor in tensors:
        for piece in tensor.pieces():
            yield tensor.name, piece


def written_dtype(stored: StoredTensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type that a tensor is written in: only floating-point numbers change theirs."""
    return stored.dtype if dtype is None or not stored.dtype.is_floating_point else dtype


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16"""
    return str(dtype).removeprefix("torch.")


def check_written(
    folder: Path,
    hashes: dict[str, str],
    tensors: Sequence[ExportedTensor],
    on_bytes: Callable[[int], None],
    fingerprint: str | None = None,
) -> None:
    """Read back what was written.

    The files must have the hashes taken while writing, and every tensor the planned name, shape and type; some tensors
    are computed once more and compared value by value.

    Args:
        hashes: SHA-256 of the files by name, taken while writing.
        fingerprint: of the source's weights, where the written ones are the same values. They are then compared by it,
            and not by the hashes of their files.

    Raises:
        Failed: something is not as it should be; says what.
    """
    for name, expected in hashes.items():
        if fingerprint is not None and name.endswith(".safetensors"):
            continue
        if file_hash(folder / name, on_bytes) != expected:
            raise Failed(f"{name} does not read back as it was written: is the disk sound? Nothing was kept")
    if fingerprint is not None and weights_fingerprint(folder, on_bytes) != fingerprint:
        raise Failed(
            "the written weights do not read back as those of the source: is the disk sound? Nothing was kept"
        )
    files = [folder / name for name in hashes if name.endswith(".safetensors")]
    there = {stored.name: stored for file in files for stored in tensors_in(file)}
    plans = {tensor.name: tensor.planned for tensor in tensors}
    if there.keys() != plans.keys():
        raise Failed(f"the written files lack or add {min(there.keys() ^ plans.keys())}. Nothing was kept")
    for name, plan in plans.items():
        if (there[name].shape, there[name].dtype) != (plan.shape, plan.dtype):
            raise Failed(f"{name} was written as {there[name].dtype} {there[name].shape}. Nothing was kept")
    for tensor in _spread(tensors):
        written, first = there[tensor.name], 0
        for piece in tensor.pieces():
            rows = len(piece) if piece.ndim else 0
            read = written.read(first, first + rows)
            first += rows
            if not torch.equal(read.view(torch.uint8), piece.contiguous().view(torch.uint8)):
                raise Failed(f"{tensor.name} was not written as it was computed. Nothing was kept")


def _spread(tensors: Sequence[ExportedTensor]) -> list[ExportedTensor]:
    if len(tensors) <= SAMPLED:
        return list(tensors)
    return [tensors[number * (len(tensors) - 1) // (SAMPLED - 1)] for number in range(SAMPLED)]
