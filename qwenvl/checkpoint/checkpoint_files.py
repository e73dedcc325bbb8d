"""Read a checkpoint's weight files without loading a model: names, shapes, and tensors one at a time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import CONFIG_NAME, cached_file

from qwenvl.checkpoint.gptq import dequantized, has_codes
from qwenvl.checkpoint.json_files import read_json as read_json  # others import it from here
from qwenvl.checkpoint.own_files import refuse_foreign_file, refuse_irregular_file, refuse_lfs_pointer
from qwenvl.checkpoint.stored_tensor import StoredTensor as StoredTensor
from qwenvl.errors import InputError, MissingFileError

# In the order in which Transformers looks for them.
INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_NAMES = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin")

# Beside the weights, by AutoGPTQ; its older versions leave `config.json` as it was.
GPTQ_CONFIG_NAME = "quantize_config.json"

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


def weight_files(path: str | Path) -> list[Path]:
    """Find the files that hold a checkpoint's weights, in name order.

    Args:
        path: folder or hub id (its files are fetched, or found in the cache).

    Raises:
        MissingFileError: no weights, or an index that names a missing shard.
        InputError: an index that is damaged, or names files outside of its folder.
    """
    return _find_weights(path)[0]


def _find_weights(path: str | Path) -> tuple[list[Path], Path | None]:
    """The files that hold a checkpoint's weights, and their index where there is one."""
    for name in (SINGLE_NAMES[0], INDEX_NAMES[0], SINGLE_NAMES[1], INDEX_NAMES[1]):
        if Path(path).is_dir() and (Path(path) / name).is_symlink():
            refuse_irregular_file(Path(path) / name)  # a link to nowhere is no reason to take the next
        found = find_file(path, name)
        if found is None:
            continue
        if name in SINGLE_NAMES:
            return [found], None
        shards = {shard: find_file(path, shard) for shard in sorted(set(_read_index(found).values()))}
        missing = [shard for shard, file in shards.items() if file is None]
        if missing:
            raise MissingFileError(f"{path}: {name} names {', '.join(missing)}, which is missing: fetch it again")
        return [file for file in shards.values() if file is not None], found
    if Path(path).is_dir() and any(Path(path).glob("*.gguf")):
        raise MissingFileError(
            f"{path}: the language model is in a GGUF file here, which llama.cpp runs: finetune serve and finetune "
            "chat take this folder. For anything else give the checkpoint that it was exported from"
        )
    raise MissingFileError(f"{path}: no weights here (looked for {', '.join(SINGLE_NAMES + INDEX_NAMES)})")


def _read_index(file: Path) -> dict[str, str]:
    """Tensor's name -> name of the file that holds it.

    Raises:
        InputError: the index is damaged, or names a file that is not beside it.
    """
    refuse_foreign_file(file, file.parent)
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{file} has no weight_map that names the files of weights: fetch it again")
    for shard in sorted(set(weight_map.values())):
        if PurePath(shard).name != shard or "\\" in shard or "\0" in shard or not shard.endswith(SUFFIXES):
            raise InputError(
                f"{file}: weight_map names {shard!r}, which is no file of weights beside it: fetch the index again"
            )
    return weight_map


def stored_tensors(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of a checkpoint with its name, file by file, memory-mapped: values are read when accessed.

    Pickled files are read as plain tensors only (`weights_only`): no code in them can run.

    Raises:
        MissingFileError: no weights at `path`.
        InputError: a file that is damaged.
    """
    for file in weight_files(path):
        refuse_irregular_file(file)
        refuse_lfs_pointer(file)
        with _weight_errors(file):
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                        yield name, tensors.get_tensor(name)
            else:
                yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()


def locate_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """Locate each tensor of a checkpoint by its name, in the order of the files; no values are read.

    Weights packed by GPTQ are located as the 16-bit weights that they stand for, under the names of these.

    Raises:
        MissingFileError: no weights at `path`.
        InputError: a file that is damaged, or holds something other than tensors; an index that says otherwise than
            the files; a tensor in two files; packed weights that cannot be read.
    """
    files, index = _find_weights(path)
    located: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in tensors_in(file):
            if tensor.name in located:
                raise InputError(
                    f"{tensor.name} is in {located[tensor.name].file} and in {file.name}: they are not of the same "
                    "checkpoint, fetch it again"
                )
            located[tensor.name] = tensor
    for name, shard in _read_index(index).items() if index is not None else ():
        if name not in located or located[name].file.name != shard:
            raise InputError(f"{index}: weight_map says that {name} is in {shard}, and it is not: fetch both again")
    if not has_codes(located):
        return located
    quantization, where = stored_quantization(path)
    return dequantized(located, quantization, where)


def stored_quantization(path: str | Path) -> tuple[dict[str, Any], str]:
    """How a checkpoint is quantised, as its `config.json` says or AutoGPTQ wrote beside it; and the file of that.

    Raises:
        InputError: it does not say.
    """
    for name, key in ((CONFIG_NAME, "quantization_config"), (GPTQ_CONFIG_NAME, None)):
        file = find_file(path, name)
        if file is None:
            continue
        settings = read_json(file) if key is None else read_json(file).get(key)
        if isinstance(settings, dict):
            return settings, str(file)
    raise InputError(
        f"{path}: its weights are packed, but config.json has no quantization_config that says how: restore it, or "
        "give the 16-bit checkpoint that it was made from"
    )


def tensors_in(file: Path) -> list[StoredTensor]:
    """Locate the tensors of one `.safetensors` or pickled file; no code in the latter can run (`weights_only`).

    Raises:
        MissingFileError: there is no such file.
        InputError: the file is damaged, or holds something other than tensors.
    """
    refuse_irregular_file(file)
    refuse_lfs_pointer(file)
    with _weight_errors(file):
        if file.suffix == ".safetensors":
            return _in_safetensors(file)
        with FakeTensorMode():  # reads the names and offsets of tensors, not their values
            content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise InputError(
            f"{file} holds a {type(content).__name__}, not tensors by name: this is not a file of weights"
        )
    others = [
        str(name) for name, value in content.items() if not (isinstance(value, torch.Tensor) and isinstance(name, str))
    ]
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


@contextmanager
def _weight_errors(file: Path) -> Iterator[None]:
    """Turn whatever a reader of weights raises about a missing or damaged file into an `InputError`."""
    try:
        yield
    except InputError:
        raise
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
