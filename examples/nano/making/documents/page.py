"""A square page to write and draw on, and how it is degraded afterwards: rotation, blur, noise, JPEG artefacts.

Every family draws through `Page`, which returns the box around the ink of what it wrote.
"""

import io
import math
import random
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from examples.nano.making.documents import lettering
from examples.nano.making.documents.lettering import Look
from examples.nano.making.documents.values import DoesNotFit

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels of the page; x2 - x1 is the width."""
Colour = tuple[int, int, int]
Align = Literal["left", "centre", "right"]

MARGIN = 5
"""Pixels at the edges that stay free of writing, so that nothing is cut off when the page is rotated."""
VISIBLE = 64
"""Lowest level of ink, of 255, that a box includes."""
LARGEST_ANGLE = 2.0  # degrees


class Page:
    """A page to write on.

    Args:
        size: width and height, pixels.
        draw: the document's random numbers.
        difficulty: 0 to 1, how strongly the page is degraded; 0 is a clean page of full contrast.

    Attributes:
        paper, ink: colours of the page; between them lie `muted`, for labels, and `faint`, for rules.
        letters: every letter written, as (letter, x, y) of its centre before rotation; no blanks.
    """

    def __init__(self, size: int, draw: random.Random, difficulty: float) -> None:
        self.size, self._random, self.difficulty = size, draw, difficulty
        depth = 25 + round(35 * difficulty)
        self.paper = _near(draw, 255, -depth) if draw.random() < 0.8 else (255, 255, 255)
        self.ink = _near(draw, 0, 20 + round(90 * difficulty))
        if draw.random() < 0.15:
            self.paper, self.ink = _near(draw, 0, 80), _near(draw, 255, -30)
        self.muted = mixed(self.ink, self.paper, 0.25)
        self.faint = mixed(self.ink, self.paper, 0.7)
        self.letters: list[tuple[str, float, float]] = []
        self.image = Image.new("RGB", (size, size), self.paper)
        self.pen = ImageDraw.Draw(self.image)
        self._background()

    @property
    def inner(self) -> int:
        """The width inside the margins, pixels."""
        return self.size - 2 * MARGIN

    def anchor(self, align: Align) -> float:
        """The x of a line that is aligned with the margins or the middle of the page."""
        return {"left": MARGIN, "centre": self.size / 2, "right": self.size - MARGIN}[align]

    def write(
        self,
        text: str,
        x: float,
        y: float,
        look: Look,
        *,
        align: Align = "left",
        room: float | None = None,
        colour: Colour | None = None,
    ) -> Box:
        """Write a line and return the box around its ink.

        Args:
            x: its left end, middle or right end, by `align`.
            y: its top.
            room: widest it may be, pixels; by default it may reach the margin.

        Raises:
            DoesNotFit: the line is too long, or below the page.
        """
        reach = {"left": self.size - MARGIN - x, "right": x - MARGIN, "centre": 2 * min(x, self.size - x) - 2 * MARGIN}
        look = lettering.fitted(text, look, min(reach[align], self.size if room is None else room))
        if y + look.line_height > self.size - 1:
            raise DoesNotFit
        mask, pad = lettering.mask(text, look)
        # From the width as drawn, not from the room given, so that a right-aligned line ends at `x`.
        left = {"left": x - pad, "centre": x - mask.width / 2, "right": x - mask.width + pad}[align]
        left, top = round(left), round(y) - pad
        self.image.paste(self.ink if colour is None else colour, (left, top), mask)
        middle = top + mask.height / 2
        centres = lettering.letter_centres(text, look)
        self.letters += [(letter, left + x, middle) for letter, x in zip(text, centres, strict=True) if letter != " "]
        inked = np.asarray(mask) >= VISIBLE
        xs, ys = np.flatnonzero(inked.any(axis=0)), np.flatnonzero(inked.any(axis=1))
        return left + int(xs[0]), top + int(ys[0]), left + int(xs[-1]) + 1, top + int(ys[-1]) + 1

    def rule(
        self, y: float, x1: float = MARGIN, x2: float | None = None, colour: Colour | None = None, dash: int = 0
    ) -> None:
        """Draw a horizontal line; with `dash`, in dashes of that many pixels."""
        end = self.size - MARGIN if x2 is None else x2
        for start in np.arange(round(x1), end, 2 * dash) if dash else [x1]:
            stop = min(start + dash - 1, end) if dash else end  # PIL draws the last pixel too
            self.pen.line((start, y, stop, y), fill=self.faint if colour is None else colour)

    def frame(
        self, box: Sequence[float], colour: Colour | None = None, fill: Colour | None = None, width: int = 1
    ) -> None:
        """Draw a rectangle."""
        self.pen.rectangle(tuple(box), outline=self.faint if colour is None else colour, fill=fill, width=width)

    def finish(self) -> tuple[Image.Image, float]:
        """The degraded page, and the angle in degrees by which it was rotated (see `turned`)."""
        draw, hard = self._random, self.difficulty
        image, angle = self.image, 0.0
        if draw.random() < 0.5 * hard:
            angle = draw.uniform(-LARGEST_ANGLE, LARGEST_ANGLE) * min(1.0, 0.4 + hard)
            image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=self.paper)
        if draw.random() < 0.35 * hard:
            image = image.filter(_gaussian(draw.uniform(0.25, 0.4 + 0.3 * hard)))
        if draw.random() < 0.6 * hard:
            image = self._noisy(image, round(draw.uniform(3, 6 + 22 * hard)))
        if draw.random() < 0.3 * hard:
            encoded = io.BytesIO()
            image.save(encoded, "JPEG", quality=draw.randint(85 - round(35 * hard), 92))
            image = Image.open(encoded).convert("RGB")
        return image, angle

    def _noisy(self, image: Image.Image, amplitude: int) -> Image.Image:
        """Make every pixel lighter or darker by up to `amplitude`, in all channels alike or in each by itself."""
        channels = self._random.choice((1, 1, 3))
        noise = np.frombuffer(self._random.randbytes(self.size * self.size * channels), np.uint8)
        noise = noise.reshape(self.size, self.size, channels).astype(np.int16)
        pixels = np.asarray(image, np.int16) + (noise * (2 * amplitude + 1) // 256 - amplitude)
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    def _background(self) -> None:
        """Draw a light background pattern: lines, a grid, dots, a tinted band, a gradient, a frame."""
        draw, size = self._random, self.size
        tint = mixed(self.ink, self.paper, draw.uniform(0.86, 0.94))
        pattern = draw.choice(("lines", "grid", "dots", "band", "gradient", "frame")) if draw.random() < 0.4 else None
        step, start = draw.randint(7, 18), draw.randint(0, 9)
        if pattern in ("lines", "grid"):
            for y in range(start, size, step):
                self.pen.line((0, y, size, y), fill=tint)
        if pattern == "grid":
            for x in range(start, size, step):
                self.pen.line((x, 0, x, size), fill=tint)
        if pattern == "dots":
            self.pen.point([(x, y) for y in range(start, size, step) for x in range(start, size, step)], fill=tint)
        if pattern == "band":
            low = draw.randint(0, size - 20)
            high = low + draw.randint(15, size // 2)
            self.pen.rectangle(draw.choice(((low, 0, high, size), (0, low, size, high))), fill=tint)
        if pattern == "gradient":
            ramp = _RAMP.resize((size, size), Image.Resampling.BILINEAR)
            ramp = ramp.rotate(90 * draw.randrange(4)).point([round(level * 0.16) for level in range(256)])
            self.image.paste(self.ink, (0, 0), ramp)
        if pattern == "frame":
            inset = draw.randint(0, 2)
            self.frame((inset, inset, size - 1 - inset, size - 1 - inset), colour=mixed(self.ink, self.paper, 0.6))


def turned(box: Box, size: int, angle: float) -> Box:
    """The upright box around a box after `Page.finish` rotated the page about its centre, clipped to the page."""
    sine, cosine, middle = math.sin(math.radians(angle)), math.cos(math.radians(angle)), size / 2
    corners = [(x - middle, y - middle) for x in (box[0], box[2]) for y in (box[1], box[3])]
    xs = [middle + x * cosine + y * sine for x, y in corners]
    ys = [middle - x * sine + y * cosine for x, y in corners]
    inside = [min(max(edge, 0.0), float(size)) for edge in (min(xs), min(ys), max(xs), max(ys))]
    x1, y1, x2, y2 = (round(edge, 2) for edge in inside)
    return x1, y1, x2, y2


def mixed(first: Colour, second: Colour, share: float) -> Colour:
    """The colour between two; `share` is the weight of the second."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _gaussian(sigma: float) -> ImageFilter.Kernel:
    """A 3 x 3 Gaussian blur, wide enough for a sigma below one; PIL's own takes ten times as long."""
    sides = math.exp(-1 / (2 * sigma**2))
    return ImageFilter.Kernel((3, 3), [a * b for a in (sides, 1, sides) for b in (sides, 1, sides)])


def _near(draw: random.Random, level: int, depth: int) -> Colour:
    """A colour whose channels are up to `depth` from `level`."""
    red, green, blue = (level + round(depth * draw.random()) for _ in range(3))
    return red, green, blue


_RAMP = Image.linear_gradient("L").resize((32, 32))
