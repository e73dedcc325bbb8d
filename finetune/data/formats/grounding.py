"""Format `grounding`: an image, a phrase and the phrase's box in pixels.

    {"image": ..., "phrase": "the red car", "box": [64, 48, 320, 240]}

becomes `<ref>the red car</ref>`, answered by `<box>(100,100),(500,500)</box>`: the two parts of the published
evaluation's `<ref>the red car</ref><box>`. Each of several phrases for one box (RefCOCO) becomes a sample.

Pixels become thousandths of the image, so its size must be known: each time a sample is made, the header of the
image's file is read (a PNG without EXIF at the beginning is decoded).
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from finetune.data.formats import fields
from finetune.data.formats.messages import Message
from finetune.data.formats.vqa import question_and_answer
from finetune.data.sample import BadField
from finetune.errors import InputError
from qwenvl.text.boxes import box_markup, ref_markup

COLUMNS = ("image", "phrase", "box")
PLACEHOLDER = "{phrase}"
DEFAULT_PROMPT = f"<ref>{PLACEHOLDER}</ref>"

BoxForm = Literal["xyxy", "xywh"]
"""Two corners, or the top left corner and the size; in pixels of the image after EXIF rotation."""

ImageSize = Callable[[Any], tuple[int, int]]
"""Image source -> (width, height) in pixels of the upright image; a ValueError if it cannot be read."""


def grounding(
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    image_size: ImageSize,
    box_form: BoxForm = "xyxy",
    prompt: str = DEFAULT_PROMPT,
) -> list[list[Message]]:
    """One conversation for each phrase.

    Args:
        row, columns: a phrase is text or, as in the REFER annotations of RefCOCO, a mapping with `sent`.
        image_size: reads the size of the row's image.
        box_form: how the box is stored.
        prompt: the user's text; `{phrase}` stands for the phrase.

    Raises:
        BadField: no image, phrase or box; a phrase that holds a control token; a malformed box, or one outside.
    """
    source = fields.image(fields.field(row, columns["image"]), columns["image"])
    phrases = _phrases(row, columns["phrase"])
    name = columns["box"]
    box = fields.numbers(fields.field(row, name), name, 4)
    try:
        width, height = image_size(source)
    except InputError as error:
        raise BadField(columns["image"], str(error)) from error
    try:
        answer = box_markup(box, width=width, height=height, form=box_form)
    except InputError as error:
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
        phrase = fields.text(item.get("sent") if isinstance(item, Mapping) else item, name)
        try:
            ref_markup(phrase)
        except InputError as error:
            raise BadField(name, str(error)) from error
        phrases.append(phrase)
    return phrases
