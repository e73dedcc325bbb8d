"""Format `grounding`: an image, a phrase and the box of it in pixels.

    {"image": ..., "phrase": "the red car", "box": [64, 48, 320, 240]}

becomes `<ref>the red car</ref>`, answered by `<box>(100,100),(500,500)</box>`: the two sides of the published
evaluation's `<ref>the red car</ref><box>`. Several phrases for one box (RefCOCO) make a sample of each.

Pixels become thousandths of the image, so its size must be known: reading it costs a look at the file's header for
each sample, each time it is made (PNG without EXIF at its head: a decode).
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from finetune.data.formats import fields
from finetune.data.formats.messages import Message
from finetune.data.formats.vqa import question_and_answer
from finetune.data.sample import BadField
from qwenvl.text.boxes import box_markup, ref_markup

COLUMNS = ("image", "phrase", "box")
PLACEHOLDER = "{phrase}"
DEFAULT_PROMPT = f"<ref>{PLACEHOLDER}</ref>"

ImageSize = Callable[[Any], tuple[int, int]]
"""Image source -> (width, height) in pixels of the upright image; ValueError where it cannot be had."""


def grounding(
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    image_size: ImageSize,
    box_form: Literal["xyxy", "xywh"] = "xyxy",
    prompt: str = DEFAULT_PROMPT,
) -> list[list[Message]]:
    """One conversation for each phrase.

    Args:
        row, columns: a phrase is text or, as in the REFER annotations of RefCOCO, a mapping with `sent`.
        image_size: reads the size of the row's image.
        box_form: "xyxy", two corners, or "xywh", a corner and the size; pixels of the image after EXIF rotation.
        prompt: what the user says; `{phrase}` stands for the phrase.

    Raises:
        BadField: no image, phrase or box; a phrase that holds a control token; a box that is none, or outside.
    """
    source = fields.image(fields.field(row, columns["image"]), columns["image"])
    phrases = _phrases(row, columns["phrase"])
    name = columns["box"]
    box = fields.numbers(fields.field(row, name), name, 4)
    try:
        width, height = image_size(source)
    except ValueError as error:
        raise BadField(columns["image"], str(error)) from error
    try:
        answer = box_markup(box, width=width, height=height, form=box_form)
    except ValueError as error:
        raise BadField(name, str(error)) from error
    return [
        question_and_answer(source, prompt.replace(PLACEHOLDER, phrase), answer, grounding=True) for phrase in phrases
    ]


def _phrases(row: Mapping[str, Any], column: str) -> list[str]:
    value = fields.field(row, column)
    named = [(column, value)]
    if isinstance(value, list | tuple):
        named = [(f"{column}[{index}]", item) for index, item in enumerate(value)]
    if not named:
        raise BadField(column, "is empty")
    phrases = []
    for name, item in named:
        phrase = item.get("sent") if isinstance(item, Mapping) else item
        try:
            ref_markup(fields.text(phrase, name))
        except BadField:
            raise
        except ValueError as error:
            raise BadField(name, str(error)) from error
        phrases.append(phrase)
    return phrases
