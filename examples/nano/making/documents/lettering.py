"""How text looks: size, weight and width of PIL's built-in font, and the mask of a line of text."""

import math
import random
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.nano.making.documents.values import DoesNotFit

SIZES = (12, 13)
"""Font sizes in pixels: in smaller ones letters touch, and larger ones leave pages nearly empty."""
BOLD = 0.25
"""Share of the lines that are bold."""
NARROWEST = 0.9
"""Times the natural width: how far a line may be squeezed before it counts as too long."""
HEAVIEST = 0.03
"""Pixels of weight for each pixel of size: with more, the dot of an i touches its stem."""
_PAD = 2  # pixels around a line, for strokes and overhang
_OVERHANG = 3  # pixels around a letter, for the same


@dataclass(frozen=True, slots=True)
class Look:
    """How one line of text looks.

    Attributes:
        size: of the font, pixels; a line is about 1.25 times as high.
        weight: pixels by which each stroke is widened on either side.
        stretch: times the natural width.
    """

    size: int
    weight: float = 0.0
    stretch: float = 1.0

    @property
    def line_height(self) -> int:
        """Pixels from the top of the tallest letter to the bottom of the lowest."""
        return sum(_font(self.size).getmetrics())

    def bolder(self) -> "Look":
        """The same look with wider strokes."""
        return replace(self, weight=min(self.weight + 0.3, HEAVIEST * self.size))


def sample_look(draw: random.Random) -> Look:
    """Draw one of `SIZES`, sometimes bold."""
    look = Look(draw.choice(SIZES))
    return look.bolder() if draw.random() < BOLD else look


def width(text: str, look: Look) -> int:
    """Width of a line in pixels, its strokes included."""
    natural = sum(_letter(letter, look.size, look.weight)[1] for letter in text) + 2 * look.weight
    return math.ceil(natural * look.stretch)


def fitted(text: str, look: Look, room: float) -> Look:
    """The look, squeezed if the text is wider than `room` pixels.

    Raises:
        DoesNotFit: it would have to be squeezed too far.
    """
    needed = width(text, look)
    if needed <= room:
        return look
    squeezed = replace(look, stretch=look.stretch * room / needed * 0.99)
    if squeezed.stretch < NARROWEST or width(text, squeezed) > room:
        raise DoesNotFit
    return squeezed


def mask(text: str, look: Look) -> tuple[Image.Image, int]:
    """The ink of a line as a grey image, and the pixels of padding around it.

    Letters are set without kerning. A stretched look is drawn at twice its size and scaled down, which keeps it sharp.
    """
    if look.stretch == 1:
        return _drawn(text, look.size, look.weight, _PAD), _PAD
    big = _drawn(text, 2 * look.size, 2 * look.weight, 2 * _PAD)
    small = (max(1, round(big.width * look.stretch / 2)), big.height // 2)
    return big.resize(small, Image.Resampling.HAMMING), _PAD


def letter_centres(text: str, look: Look) -> list[float]:
    """The horizontal centre of each letter, in pixels from the left edge of `mask`'s image."""
    drawn, scale = (1, 1.0) if look.stretch == 1 else (2, look.stretch / 2)
    advances = [_letter(letter, drawn * look.size, drawn * look.weight)[1] for letter in text]
    return [
        (drawn * _PAD + end - advance / 2) * scale for end, advance in zip(accumulate(advances), advances, strict=True)
    ]


def _drawn(text: str, size: int, weight: float, pad: int) -> Image.Image:
    """Compose the line of cached letters: many times faster than drawing the strokes again."""
    letters = [_letter(letter, size, weight) for letter in text]
    ends = list(accumulate(advance for _, advance in letters))
    ink = np.zeros((letters[0][0].shape[0] + 2 * pad, math.ceil(ends[-1]) + 2 * pad), np.uint8)
    for (glyph, advance), end in zip(letters, ends, strict=True):
        left = round(end - advance) + pad - _OVERHANG
        # Strokes of neighbours may overlap; beyond the padding there is no ink.
        start, stop = max(left, 0), min(left + glyph.shape[1], ink.shape[1])
        place = ink[pad:-pad, start:stop]
        np.maximum(place, glyph[:, start - left : stop - left], out=place)
    return Image.fromarray(ink)


@lru_cache(maxsize=20_000)
def _letter(letter: str, size: int, weight: float) -> tuple[np.ndarray, float]:
    """A letter's ink, (line height, width + 2 x overhang), and the pixels to the next letter."""
    # The built-in font prints a box for any other character.
    assert letter.isascii() and letter.isprintable(), letter
    font = _font(size)
    advance = font.getlength(letter)
    image = Image.new("L", (math.ceil(advance) + 2 * _OVERHANG, sum(font.getmetrics())))
    ImageDraw.Draw(image).text((_OVERHANG, 0), letter, fill=255, font=font, stroke_width=weight)
    return np.asarray(image), advance


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow's wheels have FreeType"
    return font
