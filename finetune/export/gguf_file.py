"""A GGUF file written tensor by tensor, in pieces: memory stays at a few hundred megabytes however large the model."""

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.errors import UserError
from finetune.export.gguf_types import gguf_name, tensor_type
from finetune.export.tensors import ExportedTensor
from finetune.llamacpp.library import quantize_chunk

ALIGNMENT = 32
"""Bytes; a tensor begins at a multiple."""

LARGEST = torch.finfo(torch.float16).max
"""Also the scales of quantised blocks are float16."""

# A quantiser works on one core; it releases the GIL.
THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: in the file.
        source: what it is made of, in any type.
        type: by its name in GGUF, such as Q4_K.
    """

    name: str
    source: ExportedTensor
    type: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.planned.shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // _block(self.type)[0] * _block(self.type)[1]

    def pieces(self) -> Iterator[np.ndarray]:
        """Its bytes, in order; each piece is of whole rows.

        Raises:
            UserError: a value is not finite, or too large for float16.
        """
        for piece in self.source.pieces():
            values = piece.float()
            self._refuse_values(values)
            yield quantized(values, self.type)

    def _refuse_values(self, values: torch.Tensor) -> None:
        largest = values.abs().max()
        if not largest.isfinite():
            raise UserError(
                f"{self.source.source.name} has values that are not finite (NaN or infinity): this checkpoint is "
                "damaged, or its training diverged"
            )
        if self.type != "F32" and largest > LARGEST:
            raise UserError(
                f"{self.source.source.name}: {largest:.3g} is more than float16 can hold ({LARGEST:,.0f}), which GGUF "
                f"files have in {self.type}: this model cannot be exported to them"
            )


def plan_gguf(tensors: Sequence[ExportedTensor], kind: str, layers: int) -> list[GgufTensor]:
    """The tensors of the GGUF file of a kind, from those of Transformers' Qwen2."""
    planned = []
    for tensor in tensors:
        name = gguf_name(tensor.name)
        planned.append(GgufTensor(name, tensor, tensor_type(name, tensor.planned.shape, kind, layers)))
    return planned


def write_gguf(
    path: Path,
    metadata: Callable[[Any], None],
    tensors: Sequence[GgufTensor],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a GGUF file and bring it to the disk (fsync).

    Args:
        path: does not exist.
        metadata: adds keys to a `gguf.GGUFWriter`.
        tensors: in the file's order.
        on_bytes: called with the number of bytes just written.

    Raises:
        UserError: a value that cannot be written.
        OSError: the disk is full or fails.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "qwen2")
    metadata(writer)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type]
        # uint8 says that the shape is in bytes.
        shape = (*tensor.shape[:-1], tensor.row_bytes)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.nbytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with path.open("ab") as file:
        _pad(file)
        for tensor in tensors:
            for piece in tensor.pieces():
                file.write(piece.data)
                on_bytes(piece.nbytes)
            _pad(file)
        file.flush()
        os.fsync(file.fileno())


def quantized(values: torch.Tensor, kind: str) -> np.ndarray:
    """The bytes of rows in a type of GGUF.

    Args:
        values: (..., values of a row) float32, contiguous.

    Returns:
        (bytes,) uint8
    """
    if kind in ("F32", "F16"):
        stored = values if kind == "F32" else values.half()
        return stored.contiguous().reshape(-1).view(torch.uint8).numpy()
    rows, width = prod(values.shape[:-1]), values.shape[-1]
    array = np.ascontiguousarray(values.reshape(rows, width).numpy())
    block, size = _block(kind)
    row_bytes = width // block * size
    content = np.empty(rows * row_bytes, dtype=np.uint8)
    quantize, number = quantize_chunk(), _number(kind)

    def work(first: int, stop: int) -> None:
        done = quantize(
            number,
            array.ctypes.data + first * width * array.itemsize,
            content.ctypes.data + first * row_bytes,
            0,
            stop - first,
            width,
            ctypes.c_void_p(None),
        )
        assert done == (stop - first) * row_bytes, f"{kind}: {done} bytes of {stop - first} rows"

    share = -(-rows // THREADS)
    if rows < THREADS or THREADS == 1:
        work(0, rows)
        return content
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda first: work(first, min(first + share, rows)), range(0, rows, share)))
    return content


def _block(kind: str) -> tuple[int, int]:
    """Values and bytes of a block."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return block, size


def _number(kind: str) -> int:
    import gguf

    return int(gguf.GGMLQuantizationType[kind])


def _pad(file: Any) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))
