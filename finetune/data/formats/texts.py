"""Format `texts`: images and questions about them, as The Cauldron and FineVision have them.

    {"images": ["receipt.jpg"], "texts": [{"user": "What is the total?", "assistant": "$ 12.40"},
                                          {"user": "And the date?", "assistant": "May 4"}]}

All pairs of a row are one conversation. The images stand before the first question, or at the `<image>` of the
questions, as many as there are.
"""

from collections.abc import Mapping
from typing import Any

from finetune.data.formats import fields
from finetune.data.formats.messages import Message, fill_images
from finetune.data.formats.system import put_system_first
from finetune.data.formats.turn_loss import train_flag
from finetune.data.sample import BadField

COLUMNS = ("images", "texts", "system")


def texts(row: Mapping[str, Any], columns: Mapping[str, str], *, text_places: bool = True) -> list[list[Message]]:
    """The one conversation of a row.

    Args:
        text_places: whether `<image>` in a question is the place of an image; False leaves it as text.

    Raises:
        BadField: a row that is not as above, or images and places that differ in number.
    """
    name = columns["texts"]
    conversation: list[Message] = []
    for index, pair in enumerate(fields.mappings(fields.field(row, name), name)):
        user = pair.get("user")
        if not isinstance(user, str):
            raise BadField(f"{name}[{index}].user", f"must be text, not {type(user).__name__}")
        answer = fields.text(pair.get("assistant"), f"{name}[{index}].assistant")
        flag = train_flag(pair, "assistant", f"{name}[{index}]")
        conversation += [{"role": "user", "content": user}, {"role": "assistant", "content": answer, **flag}]
    put_system_first(conversation, row, columns["system"])
    fill_images(conversation, fields.images(row, columns["images"]), columns["images"], text_places=text_places)
    return [conversation]
