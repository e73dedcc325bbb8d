"""A conversation as a row of training data, in the `messages` format, with its images where the row finds them."""

import filecmp
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import UserError


def append_row(file: str | Path, messages: Sequence[Mapping[str, Any]]) -> int:
    """Add a conversation to a JSON Lines file, to be trained on as it is.

    Images below the file's folder are named by their place there. Others are copied into `NAME_images` beside the
    file, since a row's images are only looked for in its own folder.

    Args:
        file: `.jsonl`; made where it does not exist.
        messages: as `qwenvl.text.chat.render_chat` takes them; image sources are absolute paths.

    Returns:
        The line that the row has in the file, counted from 1.

    Raises:
        UserError: not a `.jsonl` file, or no reply in the conversation.
        OSError: it cannot be written; the file is as it was.
    """
    file = Path(file).expanduser().absolute()
    if file.suffix != ".jsonl":
        raise UserError(f"{file.name}: rows go into a file that ends in .jsonl")
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("there is no reply to save yet")
    images: list[str] = []
    written = [_without_sources(message, images) for message in messages]
    row = {"messages": written, "images": [_place(Path(image), file) for image in images]}
    line = json.dumps(row, ensure_ascii=False) + "\n"
    with file.open("ab+") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(0)
        before = opened.read()
        if before and not before.endswith(b"\n"):
            line = "\n" + line
        try:
            opened.write(line.encode())
            opened.flush()
            os.fsync(opened.fileno())
        except OSError:
            os.ftruncate(opened.fileno(), size)
            raise
    return before.count(b"\n") + 1 + (bool(before) and not before.endswith(b"\n"))


def _without_sources(message: Mapping[str, Any], images: list[str]) -> dict[str, Any]:
    """The message with bare image places; their sources are added to `images`."""
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
    """How the row names an image, which is put below the file's folder if it is not there."""
    folder = file.parent.resolve()
    if image.resolve().is_relative_to(folder):
        return str(image.resolve().relative_to(folder))
    copies = file.with_name(f"{file.stem}_images")
    copies.mkdir(exist_ok=True)
    number = 1
    while True:
        copy = copies / (image.name if number == 1 else f"{image.stem}-{number}{image.suffix}")
        if not copy.exists():
            shutil.copyfile(image, copy)
        if filecmp.cmp(image, copy, shallow=False):
            return f"{copies.name}/{copy.name}"
        number += 1  # another image of the same name
