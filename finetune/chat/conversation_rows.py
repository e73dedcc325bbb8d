"""Saves a conversation as a row of training data in the `messages` format, with its images beside the file."""

import filecmp
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.files.path_errors import path_errors
from qwenvl.images.page_references import find_page


def append_row(file: str | Path, messages: Sequence[Mapping[str, Any]]) -> int:
    """Append a conversation to a JSON Lines file, as a row to train on.

    Images below the file's folder are referred to by their relative path. Others are copied into `NAME_images` beside
    the file, since a row's images must be in the folder of its file.

    Args:
        file: `.jsonl`; created if it does not exist.
        messages: as `qwenvl.text.chat.render_chat` takes them; image sources are absolute paths.

    Returns:
        The row's line number in the file, from 1.

    Raises:
        UserError: not a `.jsonl` file, no reply in the conversation, or a file or image that cannot be written; the
            file is unchanged then.
    """
    file = Path(file).expanduser().absolute()
    if file.suffix != ".jsonl":
        raise UserError(f"{file.name}: rows go into a file that ends in .jsonl")
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("there is no reply to save yet")
    images: list[str] = []
    written = [_without_sources(message, images) for message in messages]
    row = {"messages": written, "images": [_place(Path(image), file) for image in images]}
    with path_errors(file, "save the conversation to", "Give another file"):
        return _append_line(file, json.dumps(row, ensure_ascii=False))


def _append_line(file: Path, line: str) -> int:
    """Append a line to a file, whose last line may lack its end; returns its number, from 1."""
    with file.open("ab+") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(0)
        before = opened.read()
        is_open = bool(before) and not before.endswith(b"\n")
        try:
            opened.write((b"\n" if is_open else b"") + line.encode() + b"\n")
            opened.flush()
            os.fsync(opened.fileno())
        except OSError:
            os.ftruncate(opened.fileno(), size)
            raise
    return before.count(b"\n") + is_open + 1


def _without_sources(message: Mapping[str, Any], images: list[str]) -> dict[str, Any]:
    """The message with its image sources moved to `images`."""
    if isinstance(message["content"], str):
        return dict(message)
    parts = []
    for part in message["content"]:
        if part["type"] == "image":
            images.append(part["image"])
            part = {key: value for key, value in part.items() if key != "image"}
        parts.append(dict(part))
    return {**message, "content": parts}


def _place(image: Path, file: Path) -> str:
    """The path of an image in the row; the image is copied below the file's folder if it is not there."""
    name, page = find_page(str(image), None)
    image, named = Path(name), "" if page is None else f"#{page}"
    folder = file.parent.resolve()
    if image.resolve().is_relative_to(folder):
        return f"{image.resolve().relative_to(folder)}{named}"
    copies = file.with_name(f"{file.stem}_images")
    with path_errors(copies, "copy images to", "Give another file"):
        copies.mkdir(exist_ok=True)
    with path_errors(image, f"copy to {copies} the image", "See that it can be read, or give another file"):
        return f"{copies.name}/{_copy_name(image, copies)}{named}"


def _copy_name(image: Path, copies: Path) -> str:
    """The name of an image's copy in a folder; it is copied if it is not there."""
    number = 1
    while True:
        copy = copies / (image.name if number == 1 else f"{image.stem}-{number}{image.suffix}")
        if not copy.exists():
            shutil.copyfile(image, copy)
        if filecmp.cmp(image, copy, shallow=False):
            return copy.name
        number += 1  # another image of the same name
