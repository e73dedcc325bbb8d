"""Format `llava`: LLaVA's and ShareGPT's conversations.

    {"image": "receipt.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is the total?"}, {"from": "gpt", "value": "$ 12.40"}]}

`image` (or `images`) is one image or a list; each `<image>` in a human's text is the place of one, in order. The
column `system` may stand instead of a first turn.
"""

from collections.abc import Mapping
from typing import Any

from finetune.data.formats import fields
from finetune.data.formats.messages import Message
from finetune.data.formats.places import PLACE, split_places
from finetune.data.formats.qwen_json import turn_role, turn_text
from finetune.data.formats.system import put_system_first
from finetune.data.formats.turn_loss import train_flag
from finetune.data.sample import BadField

COLUMNS = ("image", "conversations", "system")
_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def llava(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[list[Message]]:
    """The one conversation of a row.

    Raises:
        BadField: a row that is not as above, or images and places that differ in number.
    """
    name = columns["conversations"]
    image_column = column_of_images(row, columns)
    images = fields.images(row, image_column)
    places: list[dict[str, Any]] = []
    conversation: list[Message] = []
    for index, turn in enumerate(fields.mappings(fields.field(row, name), name)):
        role = turn_role(turn, index, f"{name}[{index}]", _ROLES)
        content: str | list[dict[str, Any]] = turn_text(turn, role, f"{name}[{index}]")
        if role == "user" and PLACE in content:
            content = split_places(str(content))
            places += [part for part in content if part["type"] == "image"]
        conversation.append({"role": role, "content": content, **train_flag(turn, role, f"{name}[{index}]")})
    if len(places) != len(images):
        raise BadField(image_column, f"has {len(images)} image(s) for {len(places)} <image> in the human's turns")
    for place, source in zip(places, images, strict=True):
        place["image"] = source
    put_system_first(conversation, row, columns["system"])
    return [conversation]


def column_of_images(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The column that has the row's images."""
    column = columns["image"]
    has_other = column == "image" and row.get("image") is None and row.get("images") is not None
    return "images" if has_other else column
