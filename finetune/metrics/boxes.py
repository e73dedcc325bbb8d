"""Boxes that a model writes, against gold boxes in pixels (RefCOCO, ScreenSpot).

`qwenvl`, which reads the markup, is imported inside functions: it takes seconds to import, and the command line needs
the names of tasks before that.
"""

import re
from collections.abc import Sequence

IOU_THRESHOLD = 0.5
"""Smallest IoU that counts as found."""

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels of the upright image."""

# A base model's prompt ends in an open `<box>`: its reply begins with the coordinates.
_OPENING_POINTS = re.compile(r"\s*(\([^()]*\)\s*,\s*\([^()]*\))")


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 if both are empty."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def first_box(prediction: str, image_size: tuple[int, int]) -> Box | None:
    """The first box of a reply in pixels; None if it has no box that can be read.

    Args:
        prediction: a text with `<box>(x1,y1),(x2,y2)</box>` in thousandths of the image; or, as a base model continues
            after an open `<box>`, a text that begins with `(x1,y1),(x2,y2)`.
        image_size: width and height of the upright image in pixels.
    """
    from qwenvl.text.boxes import Box as PixelBox
    from qwenvl.text.grounding import parse_grounding

    for region in parse_grounding(as_markup(prediction)).regions:
        shape = region.to_pixels(*image_size)
        if isinstance(shape, PixelBox):
            return shape.x1, shape.y1, shape.x2, shape.y2
    return None


def as_markup(prediction: str) -> str:
    """A reply with the `<box>` around its first points that the prompt of a base model has opened already."""
    opening = _OPENING_POINTS.match(prediction)
    if not opening:
        return prediction
    return f"<box>{opening[1]}</box>{prediction[opening.end() :].removeprefix('</box>')}"


def grounding_accuracy(prediction: str, gold: Sequence[float], image_size: tuple[int, int]) -> float:
    """1.0 if the first box of the reply has an IoU of at least 0.5 with the gold box; 0.0 for a reply without a box.

    Source: accuracy at 0.5 as in Kazemzadeh et al. 2014, "ReferItGame", and later work on RefCOCO. Thousandths become
    pixels as n / 1000 * size; the published script divides by 999, which moves an edge by at most a thousandth.

    Args:
        prediction, image_size: as in `first_box`.
        gold: x1, y1, x2, y2 in pixels.
    """
    box = first_box(prediction, image_size)
    return 0.0 if box is None else float(box_iou(box, gold) >= IOU_THRESHOLD)


def click_accuracy(prediction: str, gold: Sequence[float], image_size: tuple[int, int]) -> float:
    """1.0 if the centre of the reply's first box is in the gold box, edges included (ScreenSpot).

    Source: Cheng et al. 2024, "SeeClick".

    Args:
        prediction, gold, image_size: as in `grounding_accuracy`.
    """
    box = first_box(prediction, image_size)
    if box is None:
        return 0.0
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return float(gold[0] <= x <= gold[2] and gold[1] <= y <= gold[3])
