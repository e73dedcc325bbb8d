"""Format `qwen_json`: the published fine-tuning format of Qwen-VL.

    {"id": "1", "conversations": [
        {"from": "user", "value": "Picture 1: <img>receipt.jpg</img>\\nFrame the total."},
        {"from": "assistant", "value": "<ref>the total</ref><box>(62,910),(420,955)</box>"}]}

Images are in the text, whose "Picture 1: " and newline are kept: the ids equal those of the published script. Boxes
are in thousandths of the image already, so every message is grounding text.
"""

import re
from collections.abc import Mapping
from typing import Any

from finetune.data.formats import fields
from finetune.data.formats.messages import Message
from finetune.data.formats.system import put_system_first
from finetune.data.formats.turn_loss import train_flag
from finetune.data.sample import BadField

COLUMNS = ("conversations", "system")
_ROLES = {"user": "user", "assistant": "assistant", "system": "system"}
_TAG = re.compile("<img>|</img>")


def qwen_json(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[list[Message]]:
    """The one conversation of a row.

    Raises:
        BadField: a row that is not as above; an image in a turn that is not the user's, or an unpaired image tag.
    """
    name = columns["conversations"]
    turns = fields.mappings(fields.field(row, name), name)
    conversation = [_message(turn, index, f"{name}[{index}]") for index, turn in enumerate(turns)]
    put_system_first(conversation, row, columns["system"], grounding=True)
    return [conversation]


def _message(turn: Mapping[str, Any], index: int, name: str) -> Message:
    role = turn_role(turn, index, name, _ROLES)
    value = turn_text(turn, role, name)
    parts = image_tag_parts(value, f"{name}.value")
    if role != "user" and any(part["type"] == "image" for part in parts):
        raise BadField(f"{name}.value", "only a user's turn can hold images")
    content = parts if role == "user" else value
    return {"role": role, "content": content, "grounding": True, **train_flag(turn, role, name)}


def turn_role(turn: Mapping[str, Any], index: int, name: str, roles: Mapping[str, str]) -> str:
    """The role that `from` names.

    Raises:
        BadField: a role that is not in `roles`, or a system turn that is not the first.
    """
    speaker = turn.get("from")
    role = roles.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BadField(f"{name}.from", f"must be one of {', '.join(roles)}, not {speaker!r}"[:200])
    if role == "system" and index:
        raise BadField(f"{name}.from", "a system turn can only be the first")
    return role


def turn_text(turn: Mapping[str, Any], role: str, name: str) -> str:
    """The text under `value`.

    Raises:
        BadField: no text, or a blank text of the assistant.
    """
    value = turn.get("value")
    if not isinstance(value, str):
        raise BadField(f"{name}.value", f"must be text, not {type(value).__name__}")
    return fields.text(value, f"{name}.value") if role == "assistant" else value


def image_tag_parts(value: str, name: str) -> list[dict[str, Any]]:
    """A text as parts: each `<img>path</img>` an image part, the rest as text parts; at least one part.

    Raises:
        BadField: tags that are not paired, or an empty path.
    """
    tags = [*_TAG.finditer(value)]
    if any(tag[0] != ("<img>", "</img>")[index % 2] for index, tag in enumerate(tags)) or len(tags) % 2:
        raise BadField(name, "<img> and </img> are not paired; to write them as text, use format `messages`")
    parts: list[dict[str, Any]] = []
    cursor = 0
    for opening, closing in zip(tags[0::2], tags[1::2], strict=True):
        if opening.start() > cursor:
            parts.append({"type": "text", "text": value[cursor : opening.start()]})
        source = fields.image(value[opening.end() : closing.start()].strip(), name)
        # The text before it has the number already.
        parts.append({"type": "image", "image": source, "numbered": False})
        cursor = closing.end()
    if cursor < len(value) or not parts:
        parts.append({"type": "text", "text": value[cursor:]})
    return parts
