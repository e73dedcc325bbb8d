"""Read a checkpoint's weight files without loading a model: names, shapes, and tensors one at a time."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import cached_file

from qwenvl.checkpoint.direct_reading import SLACK, read_direct, read_through_cache
from qwenvl.errors import InputError, MissingFileError

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


def weight_files(path: str | Path) -> list[Path]:
    """Find the files that hold a checkpoint's weights, in name order.

    Args:
        path: folder or hub id (its files are fetched, or found in the cache).

    Raises:
        MissingFileError: no weights, or an index that names a missing shard.
        InputError: an index that is damaged.
    """
    for name in (SINGLE_NAMES[0], INDEX_NAMES[0], SINGLE_NAMES[1], INDEX_NAMES[1]):
        found = find_file(path, name)
        if found is None:
            continue
        if name in SINGLE_NAMES:
            return [found]
        weight_map = read_json(found).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise InputError(f"{found} has no weight_map that names the files of weights: fetch it again")
        shards = {shard: find_file(path, shard) for shard in sorted(set(weight_map.values()))}
        missing = [shard for shard, file in shards.items() if file is None]
        if missing:
            raise MissingFileError(f"{path}: {name} names {', '.join(missing)}, which is missing: fetch it again")
        return [file for file in shards.values() if file is not None]
    raise MissingFileError(f"{path}: no weights here (looked for {', '.join(SINGLE_NAMES + INDEX_NAMES)})")


def stored_tensors(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of a checkpoint with its name, file by file, memory-mapped: values are read when accessed.

    Pickled files are read as plain tensors only (`weights_only`): no code in them can run.

    Raises:
        MissingFileError: no weights at `path`.
        InputError: a file that is damaged.
    """
    for file in weight_files(path):
        with _weight_errors(file):
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                        yield name, tensors.get_tensor(name)
            else:
                yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()


def locate_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """Locate each tensor of a checkpoint by its name, in the order of the files; no values are read.

    Raises:
        MissingFileError: no weights at `path`.
        InputError: a file that is damaged, or holds something other than tensors.
    """
    return {tensor.name: tensor for file in weight_files(path) for tensor in tensors_in(file)}


def tensors_in(file: Path) -> list[StoredTensor]:
    """Locate the tensors of one `.safetensors` or pickled file; no code in the latter can run (`weights_only`).

    Raises:
        MissingFileError: there is no such file.
        InputError: the file is damaged, or holds something other than tensors.
    """
    with _weight_errors(file):
        if file.suffix == ".safetensors":
            return _in_safetensors(file)
        with FakeTensorMode():  # reads the names and offsets of tensors, not their values
            content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise InputError(
            f"{file} holds a {type(content).__name__}, not tensors by name: this is not a file of weights"
        )
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise InputError(f"{file} holds {others[0]}, which is no tensor: this is not a file of weights")
    return [_in_pickle(file, name, tensor) for name, tensor in content.items()]


def find_file(path: str | Path, name: str) -> Path | None:
    """Find a file of a checkpoint folder or hub id (fetched, or found in the cache); None if it has none.

    Raises:
        MissingFileError: `path` is neither a folder nor a hub id that can be reached.
    """
    try:
        found = cached_file(
            str(path),
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:
        raise MissingFileError(
            f"{path}: no folder here, and not available as a hub id: {_first_line(error)}"
        ) from error
    return Path(found) if found else None


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({error}): restore it") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__} where an object is expected: restore it")
    return content


@contextmanager
def _weight_errors(file: Path) -> Iterator[None]:
    """Turn whatever a reader of weights raises about a missing or damaged file into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"{file} does not exist: fetch it again") from error
    except PermissionError as error:
        raise InputError(f"{file} cannot be read: you have no permission") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{file} cannot be read: it is damaged, fetch it again ({_first_line(error)})") from error
    except Exception as error:  # pickle.UnpicklingError, and whatever else a damaged pickle raises
        raise InputError(f"{file} cannot be read as plain tensors: {_first_line(error)}") from error


def _in_safetensors(file: Path) -> list[StoredTensor]:
    with safe_open(file, framework="pt"):  # checks the header and the file's length
        pass
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    found = []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise InputError(f"{file}: {name} is of type {entry['dtype']}, which no Qwen checkpoint has")
        shape = tuple(entry["shape"])
        stride = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        offset = 8 + length + entry["data_offsets"][0]
        found.append(StoredTensor(name, file, offset, SAFETENSORS_DTYPES[entry["dtype"]], shape, stride))
    return found


def _in_pickle(file: Path, name: str, tensor: torch.Tensor) -> StoredTensor:
    # PyTorch's documented way to the offset of a storage in a checkpoint.
    storage = tensor.untyped_storage()._checkpoint_offset
    assert storage is not None, "torch.load sets it under FakeTensorMode"
    offset = int(storage) + int(tensor.storage_offset()) * tensor.dtype.itemsize
    return StoredTensor(name, file, offset, tensor.dtype, tuple(tensor.shape), tensor.stride())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
