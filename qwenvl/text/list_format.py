"""The published list format: a question as a list of images, texts and boxes.

    query = from_list_format([{"image": "receipt.jpg"}, {"text": "What is the total?"}])
    str(query)  # "Picture 1:<img>receipt.jpg</img>\\nWhat is the total?"

The published code wrote the list as one string and took images out of it again by their tags, so any text could name
an image. Here it becomes an object that carries the images; a string is only text.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from qwenvl.errors import InputError
from qwenvl.text.boxes import UNITS, ref_markup
from qwenvl.text.chat_string import write_prompt
from qwenvl.text.image_parts import picture_prefix


@dataclass(frozen=True)
class Query:
    """A question with its images, made by `from_list_format`. Printed, it is what the published code made of the list.

    Attributes:
        parts: content of a message as `qwenvl.text.chat.render_chat` takes it.
    """

    parts: tuple[Mapping[str, Any], ...]

    @property
    def images(self) -> list[Any]:
        """The sources of its images, in order."""
        return [part["image"] for part in self.parts if part["type"] == "image"]

    @property
    def text(self) -> str:
        """A raw prompt for `processor(text=query.text, images=query.images)`, as the base model is asked."""
        return write_prompt(self.parts, grounding=True, numbered=True)

    def __str__(self) -> str:
        written, pictures = [], 0
        for part in self.parts:
            if part["type"] == "image":
                pictures += 1
                written.append(f"{picture_prefix(pictures)}<img>{_name(part['image'])}</img>\n")
            else:
                written.append(part["text"])
        return "".join(written)


def from_list_format(entries: Sequence[Mapping[str, Any]]) -> Query:
    """Read a question in the published list format.

    Args:
        entries: in the order in which the model reads them, each one of
            - `{"image": source}`: any source that `qwenvl.load_image` takes; what it may reach is decided where it is
              opened (`access`);
            - `{"text": text}`: well-formed `<ref>`, `<box>` and `<quad>` in it become tokens, all else is text;
            - `{"box": [[x1, y1, x2, y2], ...]}`, and `"ref": phrase` with it: in thousandths of the image, 0..999.

    Raises:
        InputError: an entry that is none of these; the message names it.
    """
    if isinstance(entries, Mapping | str | bytes) or not isinstance(entries, Sequence):
        raise InputError(f"from_list_format takes a list of entries, not {type(entries).__name__}")
    if not entries:
        raise InputError("from_list_format was given an empty list: there is nothing to ask")
    return Query(tuple(_part(entry, f"entry {index} of the list") for index, entry in enumerate(entries)))


def _part(entry: Any, where: str) -> dict[str, Any]:
    """An entry of the list format as a part of a message."""
    keys = set(entry) if isinstance(entry, Mapping) else None
    if keys == {"image"} and entry["image"] is not None:
        return {"type": "image", "image": entry["image"]}
    if keys == {"text"} and isinstance(entry["text"], str):
        return {"type": "text", "text": entry["text"]}
    if keys in ({"box"}, {"box", "ref"}):
        return {"type": "text", "text": _label(entry.get("ref"), where) + _boxes(entry["box"], where)}
    raise InputError(
        f"{where} must be {{'image': source}}, {{'text': string}} or {{'box': [[x1, y1, x2, y2], ...], 'ref': "
        f"phrase}}, not {str(entry)[:200]}"
    )


def _label(phrase: Any, where: str) -> str:
    if phrase is None:
        return ""
    if not isinstance(phrase, str):
        raise InputError(f"{where}: ref must be a phrase, not {type(phrase).__name__}")
    try:
        return ref_markup(phrase)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _boxes(boxes: Any, where: str) -> str:
    if not isinstance(boxes, Sequence) or not boxes or not all(map(_is_box, boxes)):
        raise InputError(
            f"{where}: box must be a list of boxes [x1, y1, x2, y2], whole thousandths of the image (0..999), not "
            f"{str(boxes)[:200]}; qwenvl.boxes.box_markup makes text of pixels"
        )
    return "".join("<box>({},{}),({},{})</box>".format(*map(int, box)) for box in boxes)


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, Sequence)
        and len(box) == 4
        and all(isinstance(edge, Integral) and 0 <= int(edge) < UNITS for edge in box)
    )


def _name(image: Any) -> str:
    """An image in the printed form of a query: its path or URL."""
    if isinstance(image, Mapping):
        image = image.get("path") or b""
    if isinstance(image, str | os.PathLike):
        name = os.fsdecode(image)
        return "data URI" if name[:5].lower() == "data:" else name
    return getattr(image, "filename", "") or type(image).__name__  # of a PIL image that was opened from a file
