"""Places of images in a text, as LLaVA, LLaMA-Factory and ms-swift write them: each `<image>` stands for one.

A newline after `<image>` is dropped: Qwen-VL's format has its own after every image.
"""

from typing import Any

PLACE = "<image>"


def split_places(text: str) -> list[dict[str, Any]]:
    """The text as parts: each `<image>` an image part without a source, the rest as text parts."""
    before, *after = text.split(PLACE)
    parts: list[dict[str, Any]] = [{"type": "text", "text": before}] if before else []
    for following in after:
        parts.append({"type": "image"})
        if following := following.removeprefix("\n"):
            parts.append({"type": "text", "text": following})
    return parts
