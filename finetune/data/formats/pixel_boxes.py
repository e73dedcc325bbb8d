"""Boxes in pixels of a row: four numbers that lie in the image, and are pixels."""

from collections.abc import Sequence
from typing import Any, Literal

from finetune.data.formats import fields
from finetune.data.sample import BadField
from finetune.errors import InputError
from qwenvl.text.boxes import UNITS, Box, shapes_markup

BoxForm = Literal["xyxy", "xywh"]
"""Two corners, or the top left corner and the size; in pixels of the image after EXIF rotation."""

_QUAD = (
    "has four points, and this format takes upright boxes: give the box around them, or write the quad as <quad> in a "
    "conversation"
)


def four_numbers(value: Any, field: str) -> tuple[float, ...]:
    """The numbers of a box.

    Raises:
        BadField: anything else; quads are named.
    """
    if isinstance(value, list | tuple) and len(value) == 8 and not any(isinstance(one, list | tuple) for one in value):
        raise BadField(field, _QUAD)
    refuse_quad(value, field)
    return tuple(fields.numbers(value, field, 4))


def refuse_quad(value: Any, field: str) -> None:
    """Raises:
    BadField: the value is four pairs, where a box or a list of boxes may stand.
    """
    is_list = isinstance(value, list | tuple)
    if is_list and len(value) == 4 and all(isinstance(one, list | tuple) and len(one) == 2 for one in value):
        raise BadField(field, _QUAD)


def box_inside(numbers: Sequence[float], field: str, box_form: BoxForm, width: int, height: int) -> Box:
    """A row's box in an image of this size.

    A box may reach a pixel, or a thousandth of the image, beyond it: annotations are rounded. One that reaches further
    is of another size of the image, or in another form; one within the first pixel is in fractions of the image.

    Raises:
        BadField: it is malformed or none in this image.
    """
    try:
        box = Box.from_xywh(*numbers) if box_form == "xywh" else Box(*numbers)
        shapes_markup([box], width=width, height=height)  # refuses a box that is wholly outside
    except InputError as error:
        raise BadField(field, str(error)) from error
    for low, high, size in ((box.x1, box.x2, width), (box.y1, box.y2, height)):
        beyond = max(-low, high - size)
        if beyond > max(1, size / UNITS):
            raise BadField(
                field,
                f"reaches {beyond:g} pixels beyond the image of {width} x {height}: are these pixels of another size "
                "of the image, from before its EXIF rotation, or in another box form?",
            )
    if max(numbers) <= 1 < min(width, height):
        raise BadField(
            field,
            f"{list(numbers)} lies within the first pixel of the image of {width} x {height}: multiply fractions by "
            "its width and height, or take the row out if it has no box",
        )
    return box
