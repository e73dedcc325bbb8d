"""A checkpoint's weight files, read without loading them: names, shapes, and tensors one at a time."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import cached_file

# In the order in which Transformers looks for them.
INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_NAMES = ("model.safetensors", "pytorch_model.bin")


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
