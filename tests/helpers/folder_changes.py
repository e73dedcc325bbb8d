"""Changes that make a copy of the tiny checkpoint, or of an adapter on it, a malformed one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TINY = Path(__file__).parent.parent.parent / "examples" / "tiny"

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 224312341\n"

Change = Callable[[Path], None]
Case = tuple[str, Change]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def copy_tiny(folder: Path) -> Path:
    """The tiny checkpoint; its weights are a hard link, as changes replace files instead of writing into them."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns(WEIGHTS))
    try:
        os.link(TINY / WEIGHTS, folder / WEIGHTS)
    except OSError:
        shutil.copyfile(TINY / WEIGHTS, folder / WEIGHTS)
    return folder


def put(name: str, content: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return change


def put_json(name: str, **keys: Any) -> Change:
    """Change keys of a JSON file; it is made where it is missing."""

    def change(folder: Path) -> None:
        file = folder / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        file.unlink(missing_ok=True)
        file.write_text(json.dumps(content | keys))

    return change


def put_visual(**keys: Any) -> Change:
    def change(folder: Path) -> None:
        visual = json.loads((folder / "config.json").read_text())["visual"]
        put_json("config.json", visual={**visual, **keys})(folder)

    return change


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def put_folder(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def put_pipe(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def link_out(name: str) -> Change:
    """The file moves out of the folder, and a link to it takes its place."""

    def change(folder: Path) -> None:
        outside = folder.parent / f"outside-{name}"
        if (folder / name).exists():
            (folder / name).rename(outside)
        else:
            outside.write_text("{}")
        (folder / name).symlink_to(outside)

    return change


def link_to(name: str, target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    def write(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return write


def without(name: str) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return change_tensors(change)


def with_tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor], new: str | None = None) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[new or name] = make(tensors[name]).contiguous().clone()

    return change_tensors(change)


def cut(name: str, kept: Callable[[int], int]) -> Change:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        put(name, content[: kept(len(content))])(folder)

    return change


def put_bin(content: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return change


def sharded(change: Callable[[dict[str, Any], Path], None]) -> Change:
    """In two shards; `change` gets the index's content and the folder, and the index is written afterwards."""

    def write(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(tensors)
        shards = {"model-00001-of-00002.safetensors": names[:30], "model-00002-of-00002.safetensors": names[30:]}
        for shard, own in shards.items():
            save_file({name: tensors[name] for name in own}, folder / shard, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: shard for shard, own in shards.items() for name in own}}
        change(index, folder)
        (folder / INDEX).write_text(json.dumps(index))

    return write


def both(first: Change, second: Change) -> Change:
    def change(folder: Path) -> None:
        first(folder)
        second(folder)

    return change
