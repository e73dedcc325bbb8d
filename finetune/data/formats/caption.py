"""Format `caption`: an image and a description of it.

    {"image": ..., "caption": ["A dog on a beach.", "A brown dog runs."]}

Each of several captions becomes a sample.
"""

from collections.abc import Mapping
from typing import Any

from finetune.data.formats import fields
from finetune.data.formats.messages import Message
from finetune.data.formats.vqa import question_and_answer
from finetune.data.sample import BadField

COLUMNS = ("image", "caption")
DEFAULT_PROMPT = "Describe the image in English:"
"""The prompt of the published caption evaluation."""


def caption(row: Mapping[str, Any], columns: Mapping[str, str], prompt: str = DEFAULT_PROMPT) -> list[list[Message]]:
    """One conversation for each caption; `prompt` is the user's text.

    Raises:
        BadField: no image or no caption.
    """
    image = fields.image(fields.field(row, columns["image"]), columns["image"])
    name = columns["caption"]
    value = fields.field(row, name)
    if not isinstance(value, list | tuple):
        return [question_and_answer(image, prompt, fields.one_text(value, name))]
    if not value:
        raise BadField(name, "is empty")
    return [
        question_and_answer(image, prompt, fields.text(item, f"{name}[{index}]")) for index, item in enumerate(value)
    ]
