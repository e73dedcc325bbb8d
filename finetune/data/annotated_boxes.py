"""Rows of annotation exports whose boxes need the image: of fractions they become pixels, and sizes are compared.

An export often says how large its images were. Boxes of an image that was resized, cropped or turned since would be in
the wrong place, so that such a row is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

from finetune.data.sample import BadField
from finetune.errors import InputError

ANNOTATED = "annotated"
"""Column of such rows: {"fractions": whether boxes are fractions, "size": [width, height] or null}."""
_DIGITS = 4
"""Decimals of a pixel: what fractions as they are written do not know, rounding must not change."""
_ASPECT = 0.02
"""Share by which width / height may differ where boxes are fractions: images that were resized are rounded."""

ImageSize = Callable[[Any], tuple[int, int]]


def in_pixels(row: Mapping[str, Any], image_size: ImageSize) -> tuple[Mapping[str, Any], ImageSize]:
    """The row with boxes in pixels of its upright image, and a reader of its size that does not open it again.

    Args:
        row: of any source; others than those of annotation exports are returned as they are.
        image_size: reads the width and height of the upright image.

    Raises:
        BadField: the image cannot be read, or is not as it was when it was annotated.
    """
    note = row.get(ANNOTATED)
    if note is None:
        return row, image_size
    plain = {key: value for key, value in row.items() if key != ANNOTATED}
    try:
        width, height = image_size(row["image"])
    except InputError as error:
        raise BadField("image", str(error)) from error
    if note["size"] is not None:
        _check_size(tuple(note["size"]), (width, height), note["fractions"])
    if note["fractions"]:
        sides = (width, height, width, height)
        plain["boxes"] = [
            [round(part * side, _DIGITS) for part, side in zip(box, sides, strict=True)] for box in row["boxes"]
        ]
    return plain, lambda _: (width, height)


def _check_size(said: tuple[int, int], found: tuple[int, int], fractions: bool) -> None:
    if said == found:
        return
    was, is_now = f"{said[0]} x {said[1]}", f"{found[0]} x {found[1]}"
    if said == found[::-1]:
        raise BadField(
            "image",
            f"was {was} pixels when it was annotated and is {is_now} upright: the boxes are of the image before its "
            "EXIF rotation. Turn the boxes, or store the image without that mark",
        )
    same_form = abs(said[0] * found[1] / (said[1] * found[0]) - 1) <= _ASPECT
    if not (fractions and same_form):
        raise BadField(
            "image",
            f"was {was} pixels when it was annotated and is {is_now} now: its boxes would be in the wrong place. Give "
            "the images that were annotated",
        )
