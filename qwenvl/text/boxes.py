"""Boxes and quads in pixels, and the markup they are written in for the model.

    <ref>the dog</ref><box>(12,40),(530,998)</box>
    <ref>a sign</ref><quad>(10,20),(300,24),(298,90),(9,85)</quad>

Coordinates in markup are integers in [0, 1000): thousandths of the width and the height of the *original* image after
its EXIF rotation, counted from the top left corner, rounded down. The square resize before the vision tower does not
change them.

Writing computes floor(pixel / size * 1000), reading n / 1000 * size. Markup -> pixels -> markup is the identity, and
pixels -> markup -> pixels moves an edge by at most size / 1000 pixels. Plain floating point would break the identity
(it may give n - 1), so the division is exact, with each pixel read as the decimal that it prints as.

Writing is strict and raises, because it makes training data. `grounding.py` reads markup.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Literal

from qwenvl.errors import InputError
from qwenvl.text.vocabulary import CONTROL_TOKENS

UNITS = 1000
"""Normalised units along each side of the image; coordinates are 0..UNITS - 1."""

# A phrase may hold no control token: a program that reads control tokens in text would see the phrase end early, an
# image begin or a turn forged.
CONTROL_TOKEN = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))


@dataclass(frozen=True, slots=True)
class Box:
    """An upright rectangle in pixels of the upright image, x to the right, y down, edges at `x1 <= x2`, `y1 <= y2`.

    Zero width or height is allowed: an object smaller than one normalised unit is written and read back as such.

    Raises:
        InputError: a coordinate is not a finite number, or the corners are the wrong way round.
    """

    x1: float
    y1: float
    x2: float
    y2: float

    def __post_init__(self) -> None:
        for name in self.__slots__:
            object.__setattr__(self, name, _finite(getattr(self, name), name, "box"))
        if self.x2 < self.x1 or self.y2 < self.y1:
            raise InputError(
                f"box corners are the wrong way round: ({self.x1}, {self.y1}), ({self.x2}, {self.y2}). Give the top "
                "left corner first; boxes stored as x, y, width, height are of form xywh."
            )

    @classmethod
    def from_xywh(cls, x: float, y: float, width: float, height: float) -> "Box":
        """From the top left corner and the size, as COCO and RefCOCO store boxes; InputError on a negative size."""
        x, y = _finite(x, "x", "box"), _finite(y, "y", "box")
        width, height = _finite(width, "width", "box"), _finite(height, "height", "box")
        if width < 0 or height < 0:
            raise InputError(f"box of negative size: width {width}, height {height} pixels.")
        return cls(x, y, x + width, y + height)

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """The two corners the markup names: top left, bottom right."""
        return (self.x1, self.y1), (self.x2, self.y2)


@dataclass(frozen=True, slots=True)
class Quad:
    """Four corners (x, y) in pixels of the upright image, kept in the order given; mostly for slanted text.

    Raises:
        InputError: not four points of two finite numbers.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", _four_points(self.points))


def box_markup(
    box: Box | Sequence[float],
    *,
    width: int,
    height: int,
    form: Literal["xyxy", "xywh"] = "xyxy",
    label: str | None = None,
) -> str:
    """A pixel box as markup.

        >>> box_markup([64, 48, 320, 240], width=640, height=480, label="the dog")
        '<ref>the dog</ref><box>(100,100),(500,500)</box>'

    Args:
        box: a `Box`, or four numbers in pixels, read according to `form`. Parts outside the image are clipped.
        width, height: of the original image after EXIF rotation, pixels.
        form: "xyxy" (two corners) or "xywh" (top left corner, width, height).
        label: the phrase for a `<ref>` before the box; None for a box alone.

    Raises:
        InputError: not four finite numbers, corners the wrong way round, the box wholly outside the image, an image
            size that is not positive, an unknown form, or a label that is blank or holds a control token.
    """
    if form not in ("xyxy", "xywh"):
        raise InputError(f"form={form!r} is unknown; use 'xyxy' (two corners) or 'xywh' (corner, width, height).")
    if isinstance(box, Box):
        if form != "xyxy":
            raise InputError(f"form={form!r} was given with a Box, which holds corners; use Box.from_xywh or numbers.")
    else:
        try:
            numbers = tuple(box)
        except TypeError:
            numbers = ()
        if len(numbers) != 4:
            raise InputError(f"a box is four numbers, not {box!r}.")
        box = Box(*numbers) if form == "xyxy" else Box.from_xywh(*numbers)
    return shapes_markup([box], width=width, height=height, label=label)


def quad_markup(quad: Quad | Sequence[Sequence[float]], *, width: int, height: int, label: str | None = None) -> str:
    """A pixel quad, a `Quad` or four (x, y) points, as markup; otherwise as `box_markup`.

    Corners outside the image move to its edge one by one, which bends a quad that is partly outside.

    Raises:
        InputError: as `box_markup`; a quad is wholly outside when the rectangle around it is.
    """
    shape = quad if isinstance(quad, Quad) else Quad(_four_points(quad))
    return shapes_markup([shape], width=width, height=height, label=label)


def shapes_markup(shapes: Iterable[Box | Quad], *, width: int, height: int, label: str | None = None) -> str:
    """Several boxes and quads of one phrase: `<ref>label</ref><box>..</box><box>..</box>`.

    Raises:
        InputError: as `box_markup`, or no shape was given.
    """
    width, height = image_size(width, height)
    written = []
    for shape in shapes:
        kind = "quad" if isinstance(shape, Quad) else "box"
        points = ",".join(f"({x},{y})" for x, y in _normalised_points(shape, width, height))
        written.append(f"<{kind}>{points}</{kind}>")
    if not written:
        raise InputError("no box or quad was given; a phrase without one needs no markup.")
    return ("" if label is None else ref_markup(label)) + "".join(written)


def ref_markup(label: str) -> str:
    """The phrase between `<ref>` and `</ref>`.

    Raises:
        InputError: the label is blank or holds a control token.
    """
    if not label.strip():
        raise InputError(f"the label {label!r} is blank; give a phrase, or None for a box without one.")
    if token := CONTROL_TOKEN.search(label):
        raise InputError(
            f"the label {label[:80]!r} holds {token[0]!r} at character {token.start()}, a control token of the model; "
            "take it out of the label."
        )
    return f"<ref>{label}</ref>"


def _normalised_points(shape: Box | Quad, width: int, height: int) -> list[tuple[int, int]]:
    xs, ys = zip(*shape.points, strict=True)
    for name, low, high, size in (("width", min(xs), max(xs), width), ("height", min(ys), max(ys), height)):
        # A shape that only touches the left or top edge from outside has no pixel in the image either.
        if low >= size or (low < 0 and high <= 0):
            raise InputError(
                f"{shape} is wholly outside the image of {width} x {height} pixels (see its {name}). Are these pixels "
                "of another size of the image, from before its EXIF rotation, or in another box form?"
            )
    return [(_pixel_to_unit(x, width), _pixel_to_unit(y, height)) for x, y in shape.points]


def _pixel_to_unit(pixel: float, size: int) -> int:
    """floor(pixel / size * 1000), clipped to 0..999; exact for the decimal the pixel prints as."""
    return min(max(math.floor(Fraction(repr(pixel)) * UNITS / size), 0), UNITS - 1)


def unit_to_pixel(unit: int, size: int) -> float:
    """unit / 1000 * size, rounded once: the result has three decimals and prints as exactly those."""
    return unit * size / UNITS


def _four_points(given: Iterable[Iterable[float]]) -> tuple[tuple[float, float], ...]:
    try:
        points = [(x, y) for x, y in given]
    except (TypeError, ValueError):
        points = []
    if len(points) != 4:
        raise InputError(f"a quad is four (x, y) points, not {given!r}.")
    return tuple((_finite(x, "x", "quad"), _finite(y, "y", "quad")) for x, y in points)


def _finite(value: float, name: str, shape: str) -> float:
    """The value as Python's own int or float (NumPy scalars become one)."""
    if isinstance(value, Integral):
        return int(value)
    if not isinstance(value, Real) or not math.isfinite(value):
        raise InputError(f"{name} of a {shape} must be a finite number of pixels, not {value!r}.")
    return float(value)


def image_size(width: int, height: int) -> tuple[int, int]:
    """The size as Python's own integers.

    Raises:
        InputError: not two positive whole numbers.
    """
    for name, value in (("width", width), ("height", height)):
        if not isinstance(value, Integral) or value <= 0:
            raise InputError(f"image {name} must be a positive whole number of pixels, not {value!r}.")
    return int(width), int(height)
