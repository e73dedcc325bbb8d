"""Safetensors files written tensor by tensor: a whole checkpoint passes through a few megabytes of memory.

The format: 8 bytes with the header's length (little-endian), the header (JSON: name -> dtype, shape, place of the
bytes behind the header), the tensors' bytes. The header is known from the plan, so it is written first.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path

import torch

from finetune.files.atomic_writes import sync_folder, write_text
from finetune.files.direct_file import PIECE_BYTES, DirectFile
from qwenvl.checkpoint.direct_reading import SLACK, read_direct

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD_BYTES = 5e9

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(
    folder: Path,
    plan: Sequence[Planned],
    tensors: Iterable[tuple[str, torch.Tensor]],
    shard_bytes: float = SHARD_BYTES,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Write a checkpoint's weights into a folder: one file, or shards with an index, each brought to the disk (fsync).

    Args:
        folder: exists; files of the same names in it are an error.
        plan: what will come, in order.
        tensors: (name, tensor) in the plan's order. A tensor may come in several pieces along its first axis, so that
            it need not be in memory whole.
        shard_bytes: a shard is closed before it would exceed this; a larger tensor has a shard of its own.
        on_bytes: called with the number of bytes just written.

    Returns:
        SHA-256 of each file by its name, taken while writing.

    Raises:
        OSError: the disk is full or fails. What was written so far stays: give a folder that is thrown away then.
    """
    shards = split_into_shards(plan, shard_bytes)
    names = shard_names(len(shards))
    tensors = iter(tensors)
    hashes = {}
    for name, shard in zip(names, shards, strict=True):
        hashes[name] = _write_file(folder / name, shard, tensors, on_bytes)
    assert next(tensors, None) is None, "more tensors than planned"
    if len(shards) > 1:
        hashes[INDEX_NAME] = _write_index(folder / INDEX_NAME, names, shards)
    sync_folder(folder)
    return hashes


def split_into_shards(plan: Sequence[Planned], shard_bytes: float) -> list[list[Planned]]:
    """The plan cut into files of at most `shard_bytes`, in its order."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for planned in plan:
        if shards[-1] and size + planned.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(planned)
        size += planned.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """File names as Transformers gives them."""
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor's values in order, without a copy where the tensor is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def file_hash(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, read from the disk and not from the page cache where possible."""
    digest, size = hashlib.sha256(), path.stat().st_size
    memory = [torch.empty(min(PIECE_BYTES, size) + SLACK, dtype=torch.uint8) for _ in range(2)]
    with ThreadPoolExecutor(1) as hasher:
        hashed = None
        for number, start in enumerate(range(0, size, PIECE_BYTES)):
            content = read_direct(path, start, min(PIECE_BYTES, size - start), memory[number % 2])
            if hashed is not None:
                hashed.result()
            hashed = hasher.submit(digest.update, content.numpy().data)
            if on_bytes is not None:
                on_bytes(len(content))
        if hashed is not None:
            hashed.result()
    return digest.hexdigest()


def _header(shard: list[Planned]) -> memoryview:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    place = 0
    for planned in shard:
        entries[planned.name] = {
            "dtype": DTYPE_NAMES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [place, place + planned.nbytes],
        }
        place += planned.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _write_file(
    path: Path,
    shard: list[Planned],
    tensors: Iterator[tuple[str, torch.Tensor]],
    on_bytes: Callable[[int], None] | None,
) -> str:
    digest, header = hashlib.sha256(), _header(shard)
    size = len(header) + sum(planned.nbytes for planned in shard)
    # Hashing and writing release the GIL, so hashing in a second thread costs no time.
    with DirectFile(path, size) as file, ThreadPoolExecutor(1) as hasher:
        for content in chain([header], _contents(shard, tensors)):
            hashed = hasher.submit(digest.update, content)
            for start in range(0, len(content), PIECE_BYTES):
                piece = content[start : start + PIECE_BYTES]
                file.write(piece)
                if on_bytes is not None:
                    on_bytes(len(piece))
            hashed.result()  # the content's memory may be reused from here on
    return digest.hexdigest()


def _contents(shard: list[Planned], tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[memoryview]:
    """The tensors' bytes, each piece checked against the plan."""
    for planned in shard:
        missing = planned.nbytes
        while True:
            given = next(tensors, None)
            assert given is not None, f"{planned.name} was planned here, not the end"
            name, tensor = given
            assert name == planned.name, f"{planned.name} was planned here, not {name}"
            assert tensor.dtype == planned.dtype, f"{name}: {tensor.dtype} instead of {planned.dtype}"
            whole = tuple(tensor.shape) == planned.shape
            piece_of_it = tensor.ndim > 0 and tuple(tensor.shape[1:]) == planned.shape[1:]
            assert whole or piece_of_it, f"{name}: {tuple(tensor.shape)} is no part of {planned.shape}"
            content = tensor_bytes(tensor)
            missing -= len(content)
            assert missing >= 0, f"{name}: more rows than {planned.shape} has"
            yield content
            if not missing:
                break


def _write_index(path: Path, names: list[str], shards: list[list[Planned]]) -> str:
    index = {
        "metadata": {"total_size": sum(planned.nbytes for shard in shards for planned in shard)},
        "weight_map": {planned.name: name for name, shard in zip(names, shards, strict=True) for planned in shard},
    }
    content = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    write_text(path, content.decode())
    return hashlib.sha256(content).hexdigest()
