"""Format `llava`: LLaVA's and ShareGPT's conversations.

    {"image": "receipt.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is the total?"}, {"from": "gpt", "value": "$ 12.40"}]}

`image` is one image or a list; each `<image>` in a human's text is the place of one, in order. A newline after
`<image>` is dropped: Qwen-VL's format has its own after every image.
"""

from collections.abc import Mapping
from typing import Any

from finetune.data.formats import fields
from finetune.data.formats.messages import Message
from finetune.data.formats.qwen_json import turn_role, turn_text
from finetune.data.sample import BadField

COLUMNS = ("image", "conversations")
_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
_PLACE = "<image>"


def llava(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[list[Message]]:
    """The one conversation of a row.

    Raises:
        BadField: a row that is not as above, or images and places that differ in number.
    """
    name = columns["conversations"]
    images = fields.images(row, columns["image"])
    remaining = iter(images)
    places = 0
    conversation: list[Message] = []
    for index, turn in enumerate(fields.mappings(fields.field(row, name), name)):
        role = turn_role(turn, index, f"{name}[{index}]", _ROLES)
        value = turn_text(turn, role, f"{name}[{index}]")
        content: str | list[dict[str, Any]] = value
        if role == "user" and _PLACE in value:
            before, *texts = value.split(_PLACE)
            content = [{"type": "text", "text": before}] if before else []
            for text in texts:
                places += 1
                content.append({"type": "image", "image": next(remaining, None)})
                if text := text.removeprefix("\n"):
                    content.append({"type": "text", "text": text})
        conversation.append({"role": role, "content": content})
    if places != len(images):
        raise BadField(columns["image"], f"has {len(images)} image(s) for {places} <image> in the human's turns")
    return [conversation]
