"""Boxes of a reply in pixels of the image that they are of."""

from collections.abc import Sequence
from dataclasses import dataclass

from qwenvl.text.boxes import Quad
from qwenvl.text.grounding import parse_grounding


@dataclass(frozen=True)
class PixelBox:
    """A box or a quad of a reply.

    Attributes:
        label: the phrase of the `<ref>` before it; None where there is none.
        box: x1, y1, x2, y2 in pixels of the upright image as it was sent: the left, top, right and bottom edges; of a
            quad, the rectangle around it.
        quad: the four corners of a quad, x and y each; None of a box.
        image: number of the image in the request, from 0.
    """

    label: str | None
    box: tuple[float, float, float, float]
    quad: tuple[tuple[float, float], ...] | None
    image: int


def pixel_boxes(reply: str, sizes: Sequence[tuple[int, int]], *, opening: str = "") -> list[PixelBox]:
    """Read the boxes and quads of a reply; what cannot be read as one is left out, as it is in its text.

    The model does not say which of several images a box is on: as in `finetune chat`, it is taken for the last one.

    Args:
        reply: with its markup.
        sizes: width and height of each upright image of the request, in order.
        opening: markup at the end of the prompt that the reply goes on: `<ref>the dog</ref><box>`.
    """
    if not sizes:
        return []
    last = len(sizes) - 1
    boxes = []
    for region in parse_grounding(opening + reply).regions:
        shape = region.to_pixels(*sizes[last])
        xs, ys = zip(*shape.points, strict=True)
        quad = shape.points if isinstance(shape, Quad) else None
        boxes.append(PixelBox(region.label, (min(xs), min(ys), max(xs), max(ys)), quad, last))
    return boxes
