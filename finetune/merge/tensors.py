"""A checkpoint's tensors with an adapter merged in, one after the other, in pieces: none needs much memory.

Everything is computed in float32 and rounded once, to the type that is written. Large buffers are reused: for new ones
the operating system would clear the memory first, which takes longer than the arithmetic.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, TypeVar

import torch

from finetune.errors import UserError
from finetune.files.tensor_files import Planned
from finetune.merge.changes import Change, LowRank
from qwenvl.checkpoint.checkpoint_files import StoredTensor
from qwenvl.checkpoint.direct_reading import SLACK
from qwenvl.model.nf4_weights import dequantized

# Values computed at once. The published model's linears have up to 45 million: each is one piece, so that its product
# B A comes from one multiplication (a smaller one may round differently on some machines).
PIECE_VALUES = 46_000_000
COPIED_BYTES = 1 << 25  # read at once where nothing is computed

T = TypeVar("T")


class Scratch:
    """Buffers by purpose, reused for every piece; each grows to the largest size that was asked for.

    Pieces that are handed out alternate between two buffers: one is written to disk while the next is computed.
    """

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}
        self._turn = self._reading = 0

    def bytes(self, purpose: str, count: int) -> torch.Tensor:
        """(count,) uint8, not cleared."""
        if purpose not in self._memory or len(self._memory[purpose]) < count:
            self._memory[purpose] = torch.empty(count, dtype=torch.uint8)
        return self._memory[purpose][:count]

    def bytes_to_hand_out(self, count: int) -> torch.Tensor:
        """As `bytes`, valid until the call after the next one."""
        self._turn = 1 - self._turn
        return self.bytes(f"handed out {self._turn}", count)

    def bytes_to_read_into(self, count: int) -> torch.Tensor:
        """As `bytes`, valid for two more calls: one buffer is read into, one computed with, one written as it is."""
        self._reading = (self._reading + 1) % 3
        return self.bytes(f"read {self._reading}", count)

    def tensor(self, purpose: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor, not cleared."""
        return self.bytes(purpose, prod(shape) * dtype.itemsize).view(dtype).view(*shape)


class Part(NamedTuple):
    """Rows `start` to before `stop` of a tensor as they are stored, in the base or trained in full."""

    stored: torch.Tensor
    start: int
    stop: int


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the merged checkpoint and how it is computed.

    Attributes:
        base: the base's tensor.
        change: what the adapter does to it; None for nothing.
        dtype: that it is written in.
        seen_in: the type of the base in training: 4-bit weights, and what PiSSA and OLoRA left of the base, are
            computed in it.
        quantized: take the base's weight as 4-bit training saw it, quantised and dequantised.
    """

    base: StoredTensor
    change: Change | None
    dtype: torch.dtype
    seen_in: torch.dtype
    quantized: bool = False

    @property
    def planned(self) -> Planned:
        return Planned(self.base.name, self.base.shape, self.dtype)

    @property
    def copied(self) -> bool:
        """Whether its bytes are the base's."""
        return self.change is None and self.dtype == self.base.dtype and not self.quantized

    def pieces(self, scratch: Scratch | None = None) -> Iterator[torch.Tensor]:
        """The tensor, cut along its first axis. A piece is valid until the one after the next is asked for.

        Raises:
            UserError: a value that the written type cannot hold.
        """
        scratch = scratch or Scratch()
        for part in self.read(scratch):
            yield self.finish(part, scratch)

    def read(self, scratch: Scratch) -> Iterator[Part]:
        """What the pieces are computed from, read one after the other; a part is valid while two more are read."""
        shape = self.base.shape
        whole = self._whole_base()
        at_once = COPIED_BYTES // self.dtype.itemsize if self.copied else PIECE_VALUES
        rows = shape[0] if shape else 1
        step = max(1, at_once * rows // max(1, prod(shape)))
        for start in range(0, max(rows, 1), step):
            stop = min(start + step, rows)
            if whole is not None:
                yield Part(whole[start:stop], start, stop)
                continue
            source = self.change.replaced if self.change is not None and self.change.replaced else self.base
            # The rows of a strided tensor lie apart.
            size = source.nbytes if source.strided else step * source.nbytes // max(rows, 1)
            memory = scratch.bytes_to_read_into(size + SLACK)
            yield Part(source.read(start, stop, memory) if shape else source.read(), start, stop)

    def finish(self, part: Part, scratch: Scratch) -> torch.Tensor:
        """Compute the piece from its part.

        Raises:
            UserError: a value that the written type cannot hold.
        """
        return part.stored if self.copied else self._merged(part.stored, part.start, part.stop, scratch)

    def _merged(self, stored: torch.Tensor, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
        """Rows `start` to before `stop`, from those of the base (or what replaces it)."""
        if not self.base.dtype.is_floating_point:
            return stored.to(self.dtype)
        values = scratch.tensor("values", stored.shape, torch.float32).copy_(stored)
        if self.change is not None:
            values = _apply(self.change, values, start, stop, scratch)
        self._refuse_overflow(values)
        rounded = scratch.bytes_to_hand_out(values.numel() * self.dtype.itemsize).view(self.dtype)
        return rounded.view(values.shape).copy_(values)

    def _whole_base(self) -> torch.Tensor | None:
        """The base's weight where every row depends on all of it; None where rows can be read one by one."""
        weight = None
        if self.quantized:
            weight = dequantized(self.base.read(), self.seen_in)
        low_rank = self.change.low_rank if self.change is not None else None
        if low_rank is not None and low_rank.init is not None:
            weight = left_of_base(self.base.read(), low_rank, self.seen_in)
        return weight

    def _refuse_overflow(self, values: torch.Tensor) -> None:
        if not values.numel():
            return
        # Rounding is monotonic: where the extremes stay finite, all values do.
        extremes = torch.stack(torch.aminmax(values))
        if extremes.to(self.dtype).isfinite().all():
            return
        if extremes.isfinite().all():
            raise UserError(
                f"{self.base.name}: {extremes.abs().max():.6g} is more than {_name(self.dtype)} can hold "
                f"({torch.finfo(self.dtype).max:.5g}): give --dtype bfloat16"
            )
        raise UserError(
            f"{self.base.name}: the merged weights hold NaN or infinities: base and adapter do not belong together, "
            "or one of them is damaged"
        )


def merged_pieces(plan: Iterable[MergedTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, piece) of all tensors in order. While one is used, the next is computed and the one after it is read.

    Raises:
        UserError: a value that the written type cannot hold.
    """
    scratch = Scratch()
    parts = _ahead((tensor, part) for tensor in plan for part in tensor.read(scratch))
    return _ahead((tensor.base.name, tensor.finish(part, scratch)) for tensor, part in parts)


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The items; a thread computes the next while one is used."""
    with ThreadPoolExecutor(1) as making:
        coming = making.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = making.submit(next, items, None)
            yield item


def left_of_base(weight: torch.Tensor, low_rank: LowRank, dtype: torch.dtype) -> torch.Tensor:
    """What PiSSA or OLoRA left of the base when they took the first LoRA matrices out of it.

    PiSSA (Meng et al., 2024) takes the r largest singular directions, OLoRA (Büyükakyüz, 2024) the first r columns of
    Q and rows of R of W = QR, times LoRA's scale.

    Args:
        weight: (out, in), of the base.
        low_rank: its rank, scale and `init` are used.
        dtype: of the base in training.

    Returns:
        (out, in), in `dtype`.
    """
    weight = weight.to(dtype).float()
    rank = low_rank.a.shape[0]
    if low_rank.init == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        taken = (left[:, :rank] * values[:rank]) @ right[:rank]
    else:
        q, r = torch.linalg.qr(weight)
        taken = low_rank.scale * (q[:, :rank] @ r[:rank])
    return (weight - taken).to(dtype)


def _apply(change: Change, values: torch.Tensor, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
    """Apply everything but a replacement to rows `start` to before `stop` of a tensor, in float32."""
    if change.rows is not None:
        indices, stored = change.rows
        trained = stored.read().float()
        for number, row in enumerate(indices):
            if start <= row < stop:
                values[row - start] = trained[number]
    if change.low_rank is not None:
        low_rank = change.low_rank
        values = _product(low_rank, start, stop, scratch).view(values.shape).add_(values)
        if low_rank.magnitude is not None:
            by_row = (stop - start,) + (1,) * (values.ndim - 1)
            norms = torch.linalg.vector_norm(values.flatten(1), dim=1)
            magnitudes = low_rank.magnitude.read().float().reshape(-1)[start:stop]
            values *= (magnitudes / norms).reshape(by_row)
    if change.added is not None:
        vector, scale = change.added
        values += scale * vector.read().float()[start:stop]
    return values


def _product(low_rank: LowRank, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
    """scale * B A for the output rows `start` to before `stop`, in float32: (stop - start, values of a row)."""
    a = low_rank.a.read().float().flatten(1)
    if low_rank.transposed:
        left, right = a[:, start:stop].T, low_rank.b.read().float().T
    else:
        left, right = low_rank.b.read(start, stop).float().flatten(1), a
    out = scratch.tensor("product", (left.shape[0], right.shape[1]), torch.float32)
    return torch.mm(left, right, out=out).mul_(low_rank.scale)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
