"""The column `system` beside a conversation, as LLaMA-Factory, ms-swift and ShareGPT have it."""

from collections.abc import Mapping
from typing import Any

from finetune.data.formats import fields
from finetune.data.sample import BadField


def put_system_first(conversation: list[dict[str, Any]], row: Mapping[str, Any], column: str, **flags: bool) -> None:
    """Begin the conversation with the column's text; without one, or with an empty one, it stays as it is.

    Args:
        flags: of the message.

    Raises:
        BadField: no text, or the conversation has another system message of its own.
    """
    value = row.get(column)
    if value is None or value == "":
        return
    text = fields.text(value, column)
    if conversation[0]["role"] != "system":
        conversation.insert(0, {"role": "system", "content": text, **flags})
        return
    own = conversation[0]["content"]
    if (own if isinstance(own, str) else "".join(part["text"] for part in own)) != text:
        raise BadField(column, "differs from the system message in the conversation; keep one of them")
