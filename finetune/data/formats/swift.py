"""Format `swift`: the layouts of ms-swift.

    {"query": "<image>Where is the car?", "response": "<ref-object><bbox>", "history": [["Hello", "Hi."]],
     "system": "Be short.", "images": ["photo.jpg"],
     "objects": {"ref": ["the car"], "bbox": [[64, 48, 320, 240]], "bbox_type": "real"}}

`messages` may stand instead of `query`, `response` and `history`. Each `<image>` of the users' texts is the place of
one of `images`, over all turns; without any, the images stand before the first question. A row of the older layout has
`<img>path</img>` in its texts instead, which is read as in the format `qwen_json`.

`objects` fill the `<ref-object>` and `<bbox>` of all texts in order, as `<ref>` and `<box>`: a mapping as above, where
`image_id` says of which image each box is, or a list of `{"caption", "bbox", "bbox_type", "image"}`; either may be
JSON. Boxes are x1, y1, x2, y2: in pixels of the upright image (`real`), in thousandths (`norm1000`), or in fractions
(`norm1`).
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.data.formats import fields
from finetune.data.formats.grounding import ImageSize
from finetune.data.formats.messages import Message, fill_images, read_message
from finetune.data.formats.pixel_boxes import box_inside, four_numbers
from finetune.data.formats.qwen_json import image_tag_parts
from finetune.data.formats.system import put_system_first
from finetune.data.message_parts import content_parts, image_sources
from finetune.data.sample import BadField
from finetune.errors import InputError
from qwenvl.text.boxes import Box, ref_markup, shapes_markup

COLUMNS = ("query", "response", "history", "system", "images", "objects", "messages")
_UNITS = {"norm1000": 1000, "norm1": 1}
_FILLED = re.compile("<ref-object>|<bbox>")
_IMAGE_TAG = re.compile("</?img>")
# `width` and `height` are the sizes that the images had, which ms-swift writes into `objects` itself.
_OBJECT_KEYS = {"ref", "bbox", "bbox_type", "image_id", "width", "height"}
_ITEM_KEYS = {"caption", "ref", "bbox", "bbox_type", "image"}


def swift(
    row: Mapping[str, Any], columns: Mapping[str, str], image_size: ImageSize, *, text_places: bool = True
) -> list[list[Message]]:
    """The one conversation of a row.

    Args:
        image_size: reads the size of an image, for boxes in pixels.
        text_places: whether `<image>` in a user's text is the place of an image; False leaves it as text.

    Raises:
        BadField: a row that is not as above; images or objects and their places that differ in number.
    """
    if row.get(columns["messages"]) is not None:
        name = columns["messages"]
        for role in ("query", "response", "history"):
            if row.get(columns[role]) not in (None, "", []):
                raise BadField(columns[role], f"stands beside {name}: a row is given in one of the two ways")
        given = fields.mappings(row[name], name)
        conversation = [read_message(message, f"{name}[{index}]", index) for index, message in enumerate(given)]
    else:
        conversation = _turns(row, columns)
    put_system_first(conversation, row, columns["system"])
    images = fields.images(row, columns["images"])
    _read_image_tags(conversation, columns["images"], bool(images))
    fill_images(conversation, images, columns["images"], text_places=text_places)
    objects = row.get(columns["objects"])
    if objects is not None and objects not in ("", [], {}):
        read = _Objects.read(objects, columns["objects"])
        _check_sizes(read.sizes, images, columns["objects"], image_size)
        _fill_objects(conversation, read, columns["objects"], image_size)
    return [conversation]


def _check_sizes(sizes: list[tuple[int, int]], images: list[Any], name: str, image_size: ImageSize) -> None:
    """Raises:
    BadField: an image is not of the size that it had when its boxes were drawn.
    """
    for number, (image, said) in enumerate(zip(images, sizes, strict=False)):
        try:
            found = image_size(image)
        except InputError as error:
            raise BadField(name, str(error)) from error
        if found != said:
            raise BadField(
                name,
                f"image {number}, counted from 0, was {said[0]} x {said[1]} pixels and is {found[0]} x {found[1]}: "
                "its boxes would be in the wrong place",
            )


def _turns(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[Message]:
    name = columns["history"]
    history = row.get(name)
    if history is None:
        history = []
    if not isinstance(history, list | tuple):
        raise BadField(name, f"must be a list of [question, answer], not {type(history).__name__}")
    texts: list[tuple[str, Any, str, Any]] = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadField(f"{name}[{index}]", "must be a list of a question and its answer")
        texts.append((f"{name}[{index}][0]", pair[0], f"{name}[{index}][1]", pair[1]))
    query, response = columns["query"], columns["response"]
    texts.append((query, fields.field(row, query), response, fields.field(row, response)))
    conversation: list[Message] = []
    for asked_name, asked, answer_name, answer in texts:
        if not isinstance(asked, str):
            raise BadField(asked_name, f"must be text, not {type(asked).__name__}")
        conversation.append({"role": "user", "content": asked})
        conversation.append({"role": "assistant", "content": fields.text(answer, answer_name)})
    return conversation


def _read_image_tags(conversation: list[Message], name: str, has_images: bool) -> None:
    """Make each `<img>path</img>` of the users' texts an image part."""
    for index, message in enumerate(conversation):
        content = message["content"]
        if message["role"] != "user" or not isinstance(content, str) or not _IMAGE_TAG.search(content):
            continue
        if has_images:
            raise BadField(name, "holds images, and <img> in the text names others; give all of them in one way")
        message["content"] = image_tag_parts(content, f"turn {index + 1}")


@dataclass(frozen=True)
class _Object:
    """Boxes of one `<bbox>`, as numbers; `unit`, of "real" and the others; the image they are of, None if not said."""

    boxes: list[list[float]]
    unit: str
    image: int | None


@dataclass(frozen=True)
class _Objects:
    """Phrases and boxes, each in the order of their places; the sizes that the images had, where they are told."""

    phrases: list[str]
    boxes: list[_Object]
    sizes: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def read(cls, value: Any, name: str) -> "_Objects":
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise BadField(name, f"is text, and not JSON ({error})"[:200]) from error
        if isinstance(value, Mapping):
            return cls._from_lists(value, name)
        phrases, boxes = [], []
        for index, item in enumerate(fields.mappings(value, name)):
            place = f"{name}[{index}]"
            _refuse_unread(item, _ITEM_KEYS, place)
            if (phrase := item.get("caption") if item.get("caption") is not None else item.get("ref")) is not None:
                phrases.append(fields.text(phrase, f"{place}.caption"))
            if item.get("bbox") is not None:
                unit = _unit(item.get("bbox_type"), place)
                boxes.append(_Object(_boxes(item["bbox"], f"{place}.bbox"), unit, _number(item.get("image"), place)))
        return cls(phrases, boxes)

    @classmethod
    def _from_lists(cls, value: Mapping[str, Any], name: str) -> "_Objects":
        _refuse_unread(value, _OBJECT_KEYS, name)
        phrases = _list(value.get("ref"), f"{name}.ref")
        given = _list(value.get("bbox"), f"{name}.bbox")
        numbers = _list(value.get("image_id"), f"{name}.image_id") or [None] * len(given)
        if len(numbers) != len(given):
            raise BadField(f"{name}.image_id", f"has {len(numbers)} numbers for {len(given)} boxes")
        unit = _unit(value.get("bbox_type"), name)
        boxes = [
            _Object(_boxes(box, f"{name}.bbox[{index}]"), unit, _number(number, f"{name}.image_id[{index}]"))
            for index, (box, number) in enumerate(zip(given, numbers, strict=True))
        ]
        said = [fields.text(phrase, f"{name}.ref[{index}]") for index, phrase in enumerate(phrases)]
        return cls(said, boxes, _sizes(value, name))


def _fill_objects(conversation: list[Message], objects: _Objects, name: str, image_size: ImageSize) -> None:
    found = [match[0] for text in _texts(conversation) for match in _FILLED.finditer(text)]
    for place, given in (("<ref-object>", objects.phrases), ("<bbox>", objects.boxes)):
        if found.count(place) != len(given):
            raise BadField(name, f"has {len(given)} for {found.count(place)} {place} in the texts")
    images = list(image_sources(conversation))
    try:
        written = {
            "<ref-object>": iter([ref_markup(phrase) for phrase in objects.phrases]),
            "<bbox>": iter([_markup(boxes, images, f"{name}.bbox", image_size) for boxes in objects.boxes]),
        }
    except BadField:
        raise
    except InputError as error:
        raise BadField(name, str(error)) from error

    def filled(text: str) -> str:
        return _FILLED.sub(lambda place: next(written[place[0]]), text)

    for message in conversation:
        message["grounding"] = True
        if isinstance(message["content"], str):
            message["content"] = filled(message["content"])
        else:
            message["content"] = [
                {**part, "text": filled(part["text"])} if part["type"] == "text" else part
                for part in message["content"]
            ]


def _texts(conversation: list[Message]) -> Iterator[str]:
    for message in conversation:
        yield from (part["text"] for part in content_parts(message) if part["type"] == "text")


def _markup(boxes: _Object, images: list[Any], name: str, image_size: ImageSize) -> str:
    if boxes.unit in _UNITS:
        width = height = _UNITS[boxes.unit]
        for box in boxes.boxes:
            if not all(0 <= number <= width for number in box):
                raise InputError(f"{box} is not in 0..{width}, which is what bbox_type {boxes.unit} means")
        return shapes_markup([Box(*box) for box in boxes.boxes], width=width, height=height)
    if boxes.image is None and len(images) != 1:
        raise InputError(f"a box in pixels is of one of {len(images)} images, and nothing says of which (image_id)")
    number = boxes.image or 0
    if not 0 <= number < len(images):
        raise InputError(f"a box is of image {number}, counted from 0, and there are {len(images)}")
    width, height = image_size(images[number])
    placed = [box_inside(box, name, "xyxy", width, height) for box in boxes.boxes]
    return shapes_markup(placed, width=width, height=height)


def _boxes(value: Any, name: str) -> list[list[float]]:
    """One box or a list of them."""
    if isinstance(value, list | tuple) and value and all(isinstance(item, list | tuple) for item in value):
        return [list(four_numbers(item, f"{name}[{index}]")) for index, item in enumerate(value)]
    return [list(four_numbers(value, name))]


def _unit(value: Any, name: str) -> str:
    if value is None:
        return "real"
    if value not in ("real", *_UNITS):
        raise BadField(f"{name}.bbox_type", f"must be real, norm1000 or norm1, not {value!r}"[:200])
    return str(value)


def _sizes(value: Mapping[str, Any], name: str) -> list[tuple[int, int]]:
    sides = []
    for key in ("width", "height"):
        given = value.get(key)
        given = [given] if isinstance(given, int) else _list(given, f"{name}.{key}")
        sides.append([_number(side, f"{name}.{key}[{index}]") for index, side in enumerate(given)])
    widths, heights = sides
    sizes = [
        (width, height)
        for width, height in zip(widths, heights, strict=False)
        if width is not None and height is not None
    ]
    if not len(sizes) == len(widths) == len(heights):
        raise BadField(f"{name}.width", "must be a list of numbers, and height one of as many: a size for each image")
    return sizes


def _number(value: Any, name: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise BadField(name, f"must be a whole number, not {value!r}"[:200])
    return value


def _list(value: Any, name: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise BadField(name, f"must be a list, not {type(value).__name__}")
    return list(value)


def _refuse_unread(given: Mapping[str, Any], known: set[str], name: str) -> None:
    for key in given:
        if key not in known and given[key] is not None:
            raise BadField(f"{name}.{key}", f"is not read; objects have {', '.join(sorted(known))}"[:200])
