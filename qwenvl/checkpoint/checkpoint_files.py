"""A checkpoint's weight files, read without loading them: names, shapes, and tensors one at a time."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import cached_file

from qwenvl.checkpoint.direct_reading import SLACK, read_direct

# In the order in which Transformers looks for them.
INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_NAMES = ("model.safetensors", "pytorch_model.bin")

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file.

    Reading it, or some of its rows, takes just their bytes of memory. A memory-mapped file would count as resident as
    far as it was touched.

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
        """Whether its values lie in another order than that of its indices."""
        return self.stride != tuple(prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))

    def read(self, start: int = 0, stop: int | None = None, into: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor, or its rows (along the first axis) from `start` to before `stop`.

        Args:
            into: memory to read into (uint8, on the CPU, `direct_reading.SLACK` bytes longer than what is read), which
                the returned tensor then is a view of. Memory that was used before is several times faster than fresh
                one, which the system must first clear.

        Raises:
            ValueError: the file is shorter than it should be.
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

    def flat(self, start: int, stop: int) -> torch.Tensor:
        """Values `start` to before `stop` of the tensor as one long row."""
        stop = min(stop, prod(self.shape))
        if self.strided:
            return self.read().reshape(-1)[start:stop]
        if start >= stop:
            return torch.empty(0, dtype=self.dtype)
        size = (stop - start) * self.dtype.itemsize
        return self._values(start, stop - start, torch.empty(size + SLACK, dtype=torch.uint8))

    def _values(self, first: int, count: int, memory: torch.Tensor) -> torch.Tensor:
        """(count,) values from place `first` on, as they lie in the file."""
        place, size = self.offset + first * self.dtype.itemsize, count * self.dtype.itemsize
        try:
            content = read_direct(self.file, place, size, memory)
        except EOFError as error:
            raise ValueError(f"{self.file} ends before {self.name} does: it is cut short, fetch it again") from error
        # Behind tensors of bytes, others may lie at places that no view can begin at.
        if content.storage_offset() % self.dtype.itemsize:
            content = content.clone()
        return content.view(self.dtype)


def weight_files(path: str | Path, **hub) -> list[Path]:
    """The files that hold a checkpoint's weights, in name order.

    Args:
        path: folder or hub id (its files are fetched, or found in the cache).
        hub: `revision`, `token`, `cache_dir`, ... for a hub id.

    Raises:
        FileNotFoundError: no weights, or an index that names a missing shard.
    """
    for name in (SINGLE_NAMES[0], INDEX_NAMES[0], SINGLE_NAMES[1], INDEX_NAMES[1]):
        found = _find(path, name, **hub)
        if found is None:
            continue
        if name in SINGLE_NAMES:
            return [found]
        shards = sorted(set(json.loads(found.read_text())["weight_map"].values()))
        files = {shard: _find(path, shard, **hub) for shard in shards}
        missing = [shard for shard, file in files.items() if file is None]
        if missing:
            raise FileNotFoundError(f"{path}: {name} names {', '.join(missing)}, which is missing: fetch it again")
        return [files[shard] for shard in shards]
    raise FileNotFoundError(f"{path}: no weights here (looked for {', '.join(SINGLE_NAMES + INDEX_NAMES)})")


def stored_tensors(path: str | Path, **hub) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of a checkpoint with its name, file by file, memory-mapped: only what is touched is read.

    Pickled files are read as plain tensors only (`weights_only`): nothing in them can run.
    """
    for file in weight_files(path, **hub):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    yield name, tensors.get_tensor(name)
        else:
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()


def locate_tensors(path: str | Path, **hub) -> dict[str, StoredTensor]:
    """Each tensor of a checkpoint by its name, in the order of the files; nothing of them is read yet.

    Raises:
        FileNotFoundError: no weights at `path`.
        ValueError: a file that is damaged, or not a checkpoint's.
    """
    return {tensor.name: tensor for file in weight_files(path, **hub) for tensor in tensors_in(file)}


def tensors_in(file: Path) -> list[StoredTensor]:
    """The tensors of one `.safetensors` or pickled file; nothing in the latter can run (`weights_only`).

    Raises:
        ValueError: the file is damaged, or holds something other than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return _in_safetensors(file)
        with FakeTensorMode():  # reads the names and places of tensors, not their values
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(f"{file} cannot be read: it is damaged, fetch it again ({_first_line(error)})") from error
    except Exception as error:  # pickle.UnpicklingError and what a damaged pickle may raise besides
        raise ValueError(f"{file} cannot be read as plain tensors: {_first_line(error)}") from error
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"{file} holds {others[0]}, which is no tensor: this is not a file of weights")
    return [_in_pickle(file, name, tensor) for name, tensor in content.items()]


def _in_safetensors(file: Path) -> list[StoredTensor]:
    with safe_open(file, framework="pt"):  # checks that the header is sound and the file has its length
        pass
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    found = []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"{name} is of type {entry['dtype']}, which no Qwen checkpoint has")
        shape = tuple(entry["shape"])
        stride = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        offset = 8 + length + entry["data_offsets"][0]
        found.append(StoredTensor(name, file, offset, SAFETENSORS_DTYPES[entry["dtype"]], shape, stride))
    return found


def _in_pickle(file: Path, name: str, tensor: torch.Tensor) -> StoredTensor:
    # PyTorch's documented way to the place of a storage in a checkpoint.
    offset = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.dtype.itemsize
    return StoredTensor(name, file, offset, tensor.dtype, tuple(tensor.shape), tensor.stride())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _find(path: str | Path, name: str, **hub) -> Path | None:
    found = cached_file(
        str(path),
        name,
        **hub,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None
