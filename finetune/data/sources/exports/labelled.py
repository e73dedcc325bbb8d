"""What every layout of annotations is read into: images with their objects, captions or answers.

The readers decide nothing that the recipe decides: classes have the export's own names here, and images without
objects are in the list.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.data.sample import BadField, Origin

Unit = Literal["pixels", "fractions"]
Box = tuple[float, float, float, float]
LARGEST = 1e7
"""Most pixels, or fractions, that a coordinate may be: what is beyond is no coordinate."""
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_EDGE = 1e-3  # of a pixel or a fraction: what rounding may put outside the image


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a question about an image: a text, or what was chosen, which has names like a class."""

    question: str
    text: str = ""
    choices: tuple[str, ...] = ()


@dataclass(slots=True)
class LabelledImage:
    """One image of an export.

    Attributes:
        name: as the export names the image.
        origin: where it is in the export.
        folder: that a relative name starts at, from the export's folder; None is the root of the images, or else the
            export's folder.
        size: width and height in pixels as the export has them; None where it has not.
        unit: of the boxes: pixels, or fractions of the image's width and height.
        objects: (class, box) in the order of the export; a box is x1, y1, x2, y2.
        captions: texts that describe the image.
        answers: to questions about the image.
        annotated: whether somebody looked at the image; if not, nothing is known about its objects.
        complete: whether nothing that shows an object was left out; if not, the image is not one without objects.
        problem: (field, reason) why the image cannot be used.
    """

    name: str
    origin: Origin
    folder: str | None = None
    size: tuple[int, int] | None = None
    unit: Unit = "pixels"
    objects: list[tuple[str, Box]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    annotated: bool = True
    complete: bool = True
    problem: tuple[str, str] | None = None

    def refuse(self, error: BadField) -> None:
        """Keep the first reason why the image cannot be used."""
        if self.problem is None:
            self.problem = (error.field, error.reason)


@dataclass(slots=True)
class Export:
    """All that was read of an export.

    Attributes:
        images: in the order of the export.
        classes: id -> name, where the layout numbers its classes; else name -> name. In the order of the export.
        left_out: what was not read, in words and the plural -> how many.
        changed: what was read as something else, in words -> how many.
    """

    images: list[LabelledImage] = field(default_factory=list)
    classes: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    def add_object(self, image: LabelledImage, label: str, box: Box, name: str, *, numbered: bool = False) -> None:
        """Add an object, its box cut at the image's edges where these are known.

        Args:
            image: that it is in.
            label: its class; or the number of it, with `numbered`, whose name is in `classes`.
            box: corners in the image's unit.
            name: of the box in the export, for messages.

        Raises:
            BadField: a box without an area, or outside the image.
        """
        if not numbered:
            self.classes.setdefault(label, label)
        image.objects.append((label, self._inside(image, box, name)))

    def _inside(self, image: LabelledImage, box: Box, name: str) -> Box:
        x1, y1, x2, y2 = box
        if not (x1 < x2 and y1 < y2):
            raise BadField(name, f"has no area: x from {x1:g} to {x2:g}, y from {y1:g} to {y2:g}")
        if image.unit == "fractions":
            width, height = 1.0, 1.0
        elif image.size is not None:
            width, height = image.size
        else:
            return box
        if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
            of = "" if image.unit == "fractions" else f" of {width:g} x {height:g} pixels"
            raise BadField(name, f"lies outside the image{of}: x from {x1:g} to {x2:g}, y from {y1:g} to {y2:g}")
        cut = (max(x1, 0), max(y1, 0), min(x2, width), min(y2, height))
        if max(abs(given - kept) for given, kept in zip(box, cut, strict=True)) > _EDGE:
            self.changed["boxes that reach outside the image, cut at its edge"] += 1
        return cut


def number(value: Any, name: str) -> float:
    """The value, which must be a finite number of a coordinate's size.

    Raises:
        BadField: anything else, truth values included.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadField(name, f"must be a number, not {type(value).__name__}")
    if not (-LARGEST <= value <= LARGEST):  # not a number is in no range
        raise BadField(name, f"{value!r} is no coordinate"[:200])
    return value


def numbers(value: Any, name: str, count: int | None = None) -> list[float]:
    """The value, which must be a list of numbers: `count` of them, or any number.

    Raises:
        BadField: anything else.
    """
    if not isinstance(value, list) or (count is not None and len(value) != count):
        shown = f"{len(value)} values" if isinstance(value, list) else type(value).__name__
        raise BadField(name, f"must be a list of {'' if count is None else f'{count} '}numbers, not {shown}")
    return [number(item, f"{name}[{index}]") for index, item in enumerate(value)]


def pixels(value: Any, name: str) -> int:
    """The value, which must be a whole positive number, a width or a height; 640.0 is 640.

    Raises:
        BadField: anything else.
    """
    found = number(value, name)
    if found != int(found) or found < 1:
        raise BadField(name, f"must be a whole number of pixels from 1 on, not {value!r}")
    return int(found)


def size_of(item: Mapping[str, Any], width: str, height: str) -> tuple[int, int] | None:
    """Width and height under two keys; None where both are missing.

    Raises:
        BadField: one of them is missing or no number of pixels.
    """
    if item.get(width) is None and item.get(height) is None:
        return None
    return pixels(item.get(width), width), pixels(item.get(height), height)


def written_number(value: str, name: str) -> float:
    """As `number`, of one that is written as text.

    Raises:
        BadField: anything else.
    """
    if not _NUMBER.fullmatch(value.strip()):
        raise BadField(name, f"must be a number, not {value!r}"[:200])
    return number(float(value), name)


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """The value, which must be an object.

    Raises:
        BadField: anything else.
    """
    if not isinstance(value, dict):
        raise BadField(name, f"must be an object, not {type(value).__name__}")
    return value


def items(value: Any, name: str) -> list[Any]:
    """The value, which must be a list.

    Raises:
        BadField: anything else.
    """
    if not isinstance(value, list):
        raise BadField(name, f"must be a list, not {type(value).__name__}")
    return value


def around(xs: Sequence[float], ys: Sequence[float], name: str) -> Box:
    """The upright box around points.

    Raises:
        BadField: no points, or x and y that differ in number.
    """
    if not xs or len(xs) != len(ys):
        raise BadField(name, f"has {len(xs)} x and {len(ys)} y")
    return min(xs), min(ys), max(xs), max(ys)


def around_ellipse(x: float, y: float, rx: float, ry: float, degrees: float = 0.0) -> Box:
    """The upright box around an ellipse with half axes `rx` and `ry`, turned clockwise by `degrees`."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    half_width, half_height = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)
    return x - half_width, y - half_height, x + half_width, y + half_height


def around_turned(box: Box, degrees: float, pivot: tuple[float, float]) -> Box:
    """The upright box around one that is turned clockwise by `degrees` around `pivot`, y down."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = [(x - pivot[0], y - pivot[1]) for x in (box[0], box[2]) for y in (box[1], box[3])]
    xs = [pivot[0] + x * cos - y * sin for x, y in corners]
    ys = [pivot[1] + x * sin + y * cos for x, y in corners]
    return min(xs), min(ys), max(xs), max(ys)


def turned(degrees: float) -> bool:
    """Whether an angle turns a box at all."""
    return abs(math.remainder(degrees, 360)) > 1e-6


TURNED = "turned boxes, read as the upright box around them"
"""What `Export.changed` calls them."""


def refuse_turned(name: str, what: str) -> BadField:
    """The error for a turned box where the recipe does not say what to make of it; `what` it is, in words."""
    return BadField(
        name,
        f"is {what}, and the model's boxes are upright: set annotations.rotated: bounds for the upright box around "
        "it, or take it out of the export",
    )
