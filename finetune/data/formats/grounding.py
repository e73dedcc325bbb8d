"""Format `grounding`: an image, what to look for in it, and where that is, in pixels.

    {"image": ..., "phrase": "the red car", "box": [64, 48, 320, 240]}

becomes `<ref>the red car</ref>`, answered by `<box>(100,100),(500,500)</box>`: the two parts of the published
evaluation's `<ref>the red car</ref><box>`. Each of several phrases for one box (RefCOCO) becomes a sample. More forms:

    {"phrase": "cats", "boxes": [[64, 48, 128, 96], [320, 240, 384, 288]]}         all boxes in one reply
    {"phrase": "cats", "boxes": []}                                                 the reply for no such object
    {"phrase": ["cat", "dog"], "boxes": [[[64, 48, 128, 96]], [[1, 2, 30, 40]]]}    a list of boxes for each phrase
    {"boxes": [[64, 48, 128, 96], [1, 2, 30, 40]], "labels": ["cat", "dog"]}        asked by a prompt without {phrase}

Where a reply names its objects, the boxes of a name follow it, and each name is a line:
`<ref>cat</ref><box>..</box><box>..</box>`.

Pixels become thousandths of the image, so its size must be known: each time a sample is made, the header of the
image's file is read (a PNG without EXIF at the beginning is decoded).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.formats import fields
from finetune.data.formats.messages import Message
from finetune.data.formats.pixel_boxes import BoxForm, box_inside, four_numbers, refuse_quad
from finetune.data.formats.vqa import question_and_answer
from finetune.data.sample import BadField
from finetune.errors import InputError
from qwenvl.text.boxes import Box, ref_markup, shapes_markup

COLUMNS = ("image", "phrase", "box", "boxes", "labels")
LATER_COLUMNS = ("boxes", "labels")
"""Columns that the format did not have from the beginning."""
PLACEHOLDER = "{phrase}"
DEFAULT_PROMPT = f"<ref>{PLACEHOLDER}</ref>"
NO_OBJECT = "[]"
"""The reply where nothing is there to find: the same in every language."""

ImageSize = Callable[[Any], tuple[int, int]]
"""Image source -> (width, height) in pixels of the upright image; a ValueError if it cannot be read."""


@dataclass(frozen=True)
class FoundObject:
    """One object in the image.

    Attributes:
        label: what the reply calls it; None where the reply is boxes alone, as the question names the object.
        field: where the row has its box, such as `boxes[3]`.
        numbers: the four numbers of the box, as in the row.
    """

    label: str | None
    field: str
    numbers: tuple[float, ...]


@dataclass(frozen=True)
class Search:
    """One question of a row.

    Attributes:
        phrases: what is looked for; empty where the prompt says that.
        objects: what is there, in the order of the reply; empty where nothing is.
    """

    phrases: tuple[str, ...]
    objects: tuple[FoundObject, ...]


def grounding(
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    image_size: ImageSize,
    box_form: BoxForm = "xyxy",
    prompt: str = DEFAULT_PROMPT,
    no_object: str = NO_OBJECT,
) -> list[list[Message]]:
    """One conversation; or one for each phrase, where a row has several for one box.

    Args:
        row, columns: a phrase is text or, as in the REFER annotations of RefCOCO, a mapping with `sent`.
        image_size: reads the size of the row's image.
        box_form: how a box is stored.
        prompt: the user's text; `{phrase}` stands for the phrase, or for several with commas between. A prompt
            without it asks for all objects, each of which needs a label.
        no_object: the reply where a row has no box.

    Raises:
        BadField: no image, phrase or box; a phrase that holds a control token; boxes, phrases and labels that do not
            go together; a malformed box, or one that is not in the image.
    """
    source = fields.image(fields.field(row, columns["image"]), columns["image"])
    searches = read_searches(row, columns, prompt)
    try:
        width, height = image_size(source)
    except InputError as error:
        raise BadField(columns["image"], str(error)) from error
    conversations = []
    for search in searches:
        placed = [
            (found.label, box_inside(found.numbers, found.field, box_form, width, height)) for found in search.objects
        ]
        reply = boxes_reply(placed, width, height, no_object)
        conversations.append(question_and_answer(source, asked(prompt, search.phrases), reply, grounding=True))
    return conversations


def boxes_column(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The name of the column that has the row's boxes: that of `box`, or of `boxes`.

    Raises:
        BadField: both have some.
    """
    one, several = columns["box"], columns["boxes"]
    if row.get(several) is None:
        return several if one not in row and several in row else one
    if one != several and row.get(one) is not None:
        raise BadField(several, f"the row has {one} too: give its boxes in one of them")
    return several


def read_searches(row: Mapping[str, Any], columns: Mapping[str, str], prompt: str) -> list[Search]:
    """What a row asks for and has, without its image.

    Args:
        row, columns, prompt: as for `grounding`.

    Raises:
        BadField: as `grounding`.
    """
    name = boxes_column(row, columns)
    value = fields.field(row, name)
    phrases = _phrases(row, columns, prompt)
    if _is_box(value):
        [found] = _objects([value], name, row, columns, single=True)
        return [Search((phrase,), (found,)) for phrase in phrases] or [Search((), (found,))]
    refuse_quad(value, name)
    if not isinstance(value, list | tuple):
        raise BadField(name, f"must be a box or a list of boxes, not {type(value).__name__}")
    labelled = row.get(columns["labels"]) is not None
    if value and all(isinstance(item, list | tuple) and not _is_box(item) for item in value):
        return [Search(tuple(phrases), _objects_of_phrases(value, name, phrases, labelled))]
    if len(phrases) > 1 and value and not labelled:
        raise BadField(
            name,
            f"is a list of {len(value)} boxes for {len(phrases)} phrases: give a list of boxes for each phrase, "
            f"[[box, box], [box]], or say under {columns['labels']} what each box is",
        )
    return [Search(tuple(phrases), _objects(value, name, row, columns))]


def count_samples(row: Mapping[str, Any], columns: Mapping[str, str]) -> int:
    """The number of samples that a row makes: its phrases, where they are names of one box."""
    phrases = row.get(columns["phrase"])
    boxes = row.get(columns["boxes"])
    alone = _is_box(row.get(columns["box"]) if boxes is None else boxes)
    return max(len(phrases), 1) if alone and isinstance(phrases, list | tuple) else 1


def asked(prompt: str, phrases: Sequence[str]) -> str:
    """The prompt with its phrases; of several, each between `<ref>` tags of its own where the prompt has them."""
    place = DEFAULT_PROMPT if DEFAULT_PROMPT in prompt else PLACEHOLDER
    return prompt.replace(place, ", ".join(place.replace(PLACEHOLDER, phrase) for phrase in phrases))


def boxes_reply(objects: Sequence[tuple[str | None, Box]], width: int, height: int, no_object: str) -> str:
    """The reply that names objects, each a label or None and its box in pixels of an image of this size.

    Raises:
        InputError: as `qwenvl.text.boxes.shapes_markup`.
    """
    boxes: dict[str | None, list[Box]] = {}
    for label, box in objects:
        boxes.setdefault(label, []).append(box)
    written = [shapes_markup(own, width=width, height=height, label=label) for label, own in boxes.items()]
    return "\n".join(written) or no_object


def _phrases(row: Mapping[str, Any], columns: Mapping[str, str], prompt: str) -> list[str]:
    """What is looked for; empty for a prompt without a place for it."""
    column, labels = columns["phrase"], columns["labels"]
    if PLACEHOLDER not in prompt:
        if row.get(column) is not None:
            raise BadField(column, f"the prompt has no {PLACEHOLDER} to put it in: {prompt!r}")
        if row.get(labels) is None:
            raise BadField(labels, f"is missing: a prompt without {PLACEHOLDER} asks for all objects, with labels")
        return []
    if row.get(column) is None and row.get(labels) is not None:
        raise BadField(
            column, f"is missing; to ask for all objects with their labels, write a prompt without {PLACEHOLDER}"
        )
    value = fields.field(row, column)
    named = [(column, value)]
    if isinstance(value, list | tuple):
        named = [(f"{column}[{index}]", item) for index, item in enumerate(value)]
    if not named:
        raise BadField(column, "is empty")
    return [_name(item.get("sent") if isinstance(item, Mapping) else item, name) for name, item in named]


def _name(value: Any, field: str) -> str:
    """A phrase or label, which must fit between `<ref>` tags."""
    text = fields.text(value, field)
    try:
        ref_markup(text)
    except InputError as error:
        raise BadField(field, str(error)) from error
    return text


def _objects(
    boxes: Sequence[Any], name: str, row: Mapping[str, Any], columns: Mapping[str, str], *, single: bool = False
) -> tuple[FoundObject, ...]:
    """The objects of a list of boxes, with their labels where the row has some."""
    column = columns["labels"]
    labels = row.get(column)
    if single and isinstance(labels, str):
        labels = [labels]
    if labels is not None and (not isinstance(labels, list | tuple) or len(labels) != len(boxes)):
        given = f"{len(labels)}" if isinstance(labels, list | tuple) else type(labels).__name__
        raise BadField(column, f"must be a list of {len(boxes)}, one for each box, not {given}")
    return tuple(
        FoundObject(
            None if labels is None else _name(labels[index], f"{column}[{index}]"),
            place := name if single else f"{name}[{index}]",
            four_numbers(box, place),
        )
        for index, box in enumerate(boxes)
    )


def _objects_of_phrases(
    boxes: Sequence[Sequence[Any]], name: str, phrases: Sequence[str], labelled: bool
) -> tuple[FoundObject, ...]:
    """The objects of a list of boxes for each phrase, which are called by their phrase."""
    if labelled or len(boxes) != len(phrases):
        said = "labels too" if labelled else f"{len(phrases)} phrase(s)"
        raise BadField(name, f"holds a list of boxes for each of {len(boxes)} phrases, and the row has {said}")
    for number, own in enumerate(boxes):
        refuse_quad(own, f"{name}[{number}]")
    return tuple(
        FoundObject(phrase, place := f"{name}[{number}][{index}]", four_numbers(box, place))
        for number, (phrase, own) in enumerate(zip(phrases, boxes, strict=True))
        for index, box in enumerate(own)
    )


def _is_box(value: Any) -> bool:
    """Whether a value is one box and not a list of them: its first item is no list."""
    return isinstance(value, list | tuple) and len(value) > 0 and not isinstance(value[0], list | tuple)
