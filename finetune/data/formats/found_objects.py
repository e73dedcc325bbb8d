"""Rows of format `grounding` that hold several boxes, or none.

{"image": ..., "phrase": "car", "boxes": [[64, 48, 320, 240], [1, 2, 30, 40]]}    <box>..</box><box>..</box>
{"image": ..., "boxes": [[64, 48, 320, 240]], "labels": ["car"]}                   <ref>car</ref><box>..</box>
"""

from collections.abc import Mapping
from typing import Any

from finetune.data.formats import fields
from finetune.data.formats.messages import Message
from finetune.data.formats.vqa import question_and_answer
from finetune.data.sample import BadField
from finetune.errors import InputError
from qwenvl.text.boxes import Box, shapes_markup

NO_OBJECT = "[]"
"""The reply where nothing is there to find."""


def found_objects(row: Mapping[str, Any], size: tuple[int, int], prompt: str) -> list[list[Message]]:
    """The one conversation of a row.

    Args:
        row: boxes are corners in pixels; with `labels` each has a name in the reply.
        size: width and height of the upright image, pixels.
        prompt: the user's text; `{phrase}` stands for the phrase.

    Raises:
        BadField: a phrase or label that holds a control token; a malformed box, or one outside the image.
    """
    boxes = [fields.numbers(box, f"boxes[{index}]", 4) for index, box in enumerate(row["boxes"])]
    labels = row.get("labels") or [None] * len(boxes)
    own: dict[str | None, list[Box]] = {}
    try:
        for label, box in zip(labels, boxes, strict=True):
            own.setdefault(label, []).append(Box(*box))
        width, height = size
        lines = [shapes_markup(shapes, width=width, height=height, label=label) for label, shapes in own.items()]
    except InputError as error:
        raise BadField("boxes", str(error)) from error
    asked = prompt.replace("{phrase}", row.get("phrase") or "")
    return [question_and_answer(row["image"], asked, "\n".join(lines) or NO_OBJECT, grounding=True)]
