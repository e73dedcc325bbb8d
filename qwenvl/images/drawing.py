"""Draw boxes, quads and their labels on an image, to inspect data and replies.

    found = save_grounding(image, "<ref>the dog</ref><box>(120,80),(640,900)</box>", "reply.png")

A line has two colours: the region's, and on both sides of it a rim of black or white, whichever contrasts more. One of
the two stands out on any background. Labels are drawn on a plate of the region's colour, in the rim's colour.
"""

import math
import os
import secrets
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from qwenvl.errors import InputError, MissingFileError
from qwenvl.images.images import load_image
from qwenvl.images.label_fonts import font_for
from qwenvl.text.boxes import Box
from qwenvl.text.grounding import Grounding, Region, parse_grounding

# Okabe and Ito's palette, distinguishable with any common colour blindness; without its black, a colour of rims.
PALETTE = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)

MIN_FONT_SIZE = 10  # pixels; smaller letters run together
LABEL_CHARACTERS = 200  # of a label that are drawn at most; more never fit beside a box


class _Plate(NamedTuple):
    """A rectangle of pixels, right and bottom excluded."""

    left: int
    top: int
    right: int
    bottom: int

    def overlap(self, other: "_Plate") -> int:
        """Pixels in common."""
        if (
            self.left >= other.right
            or other.left >= self.right
            or self.top >= other.bottom
            or other.top >= self.bottom
        ):
            return 0  # nearly always; a page of text calls this a million times
        width = min(self.right, other.right) - max(self.left, other.left)
        return width * (min(self.bottom, other.bottom) - max(self.top, other.top))


def draw_regions(
    image: Any,
    regions: Iterable[Region],
    *,
    line_width: int | None = None,
    font_size: int | None = None,
    font: str | os.PathLike | None = None,
) -> Image.Image:
    """Draw regions and their labels on a copy of the image.

    Regions with the same label share a colour. A label is above its region if it fits there, otherwise below or
    inside, without covering other labels if there is room; a label wider than the image ends in "...".

    Args:
        image: any source that `images.load_image` takes, shown as the model sees it; not changed.
        regions: as `parse_grounding(text).regions` gives them.
        line_width: of the coloured line, pixels; by default 1/250 of the image's shorter side, at least 1.
        font_size: pixels; by default 1/36 of the shorter side, at least 10.
        font: a font file for the labels. By default the first font of this system that has a label's characters;
            characters that no font has are drawn as "?" with a warning.

    Returns:
        An RGB image of the upright image's size; transparent parts are white.

    Raises:
        InputError: a width or size below 1, or `font` is not a font file.
        ImageError: an image that cannot be read.
    """
    if line_width is not None and line_width < 1:
        raise InputError(f"line_width is {line_width}; it must be at least 1 pixel.")
    if font_size is not None and font_size < 1:
        raise InputError(f"font_size is {font_size}; it must be at least 1 pixel.")
    canvas = load_image(image)
    shorter = min(canvas.size)
    line_width = line_width or max(1, round(shorter / 250))
    font_size = font_size or max(MIN_FONT_SIZE, round(shorter / 36))

    font_file = None if font is None else Path(font)
    regions = list(regions)
    colours = {label: _colour(index) for index, label in enumerate(dict.fromkeys(region.label for region in regions))}
    pen = ImageDraw.Draw(canvas)
    for region in regions:
        _draw_outline(pen, region, canvas.size, colours[region.label], line_width)
    # All labels after all lines, so that no line crosses a label.
    plates: list[_Plate] = []
    for region in regions:
        if region.label is not None:
            colour = colours[region.label]
            plate = _draw_label(pen, region, region.label, canvas.size, colour, font_size, font_file, plates)
            plates += [plate] if plate else []
    return canvas


def save_grounding(
    image: Any,
    reply: str,
    path: str | os.PathLike,
    *,
    line_width: int | None = None,
    font_size: int | None = None,
    font: str | os.PathLike | None = None,
) -> Grounding:
    """Read a model's reply, draw its boxes and quads, and save the picture.

    The file gets its name only when complete; an older file of that name stays if anything fails.

    Args:
        image: the image the reply is about, as in `draw_regions`.
        reply: the model's text, decoded with its grounding tags.
        path: where to save; the extension gives the format.
        line_width, font_size, font: as in `draw_regions`.

    Returns:
        The reply's regions, and as `problems` the markup that was not drawn, or only after a repair.

    Raises:
        InputError: the extension is no image format that can be written, or the file cannot be written.
        MissingFileError: there is no such folder.
    """
    path = Path(path)
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format not in Image.SAVE:
        raise InputError(f"{path.name!r} has no extension of an image format; use .png, .jpg or .webp.")
    if not path.parent.is_dir():
        raise MissingFileError(f"there is no folder {str(path.parent)!r} to save {path.name!r} in; create it first.")
    found = parse_grounding(reply)
    drawn = draw_regions(image, found.regions, line_width=line_width, font_size=font_size, font=font)
    # In the folder of the final file, as a rename is only atomic within one file system.
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            drawn.save(file, format=image_format, quality=95)
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be written ({error.strerror or error}); give another path, or correct this one."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return found


def _colour(index: int) -> tuple[int, int, int]:
    """The colour of the index-th label: the palette, its darker tones, its lighter tones, then from the beginning."""
    tone, position = divmod(index % (3 * len(PALETTE)), len(PALETTE))
    red, green, blue = PALETTE[position]
    if tone == 1:
        return red * 5 // 10, green * 5 // 10, blue * 5 // 10
    if tone == 2:
        return (red + 255) // 2, (green + 255) // 2, (blue + 255) // 2
    return red, green, blue


def _luminance(colour: tuple[int, int, int]) -> float:
    """Relative luminance of an sRGB colour, 0 black to 1 white (WCAG 2)."""
    red, green, blue = (c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _rim(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever has the higher contrast (WCAG 2: (L + 0.05) / (L' + 0.05)) with the colour."""
    return (0, 0, 0) if (_luminance(colour) + 0.05) ** 2 > 0.05 * 1.05 else (255, 255, 255)


def _draw_outline(
    pen: ImageDraw.ImageDraw, region: Region, size: tuple[int, int], colour: tuple[int, int, int], line_width: int
) -> None:
    """Draw a box's line on its outermost pixels, a quad's along its edges, with the rim on both sides."""
    rim_width = max(1, line_width // 2)
    shape = region.to_pixels(*size)
    if isinstance(shape, Box):
        # A box without area is drawn as one pixel. PIL includes both corners.
        left, top = math.floor(shape.x1), math.floor(shape.y1)
        right, bottom = max(left, math.ceil(shape.x2) - 1), max(top, math.ceil(shape.y2) - 1)
        outside = (left - rim_width, top - rim_width, right + rim_width, bottom + rim_width)
        pen.rectangle(outside, outline=_rim(colour), width=line_width + 2 * rim_width)
        pen.rectangle((left, top, right, bottom), outline=colour, width=line_width)
    else:
        # One edge beyond the starting point, so that the first corner gets its joint too.
        path = [*shape.points, *shape.points[:2]]
        pen.line(path, fill=_rim(colour), width=line_width + 2 * rim_width, joint="curve")
        pen.line(path, fill=colour, width=line_width, joint="curve")


def _draw_label(
    pen: ImageDraw.ImageDraw,
    region: Region,
    phrase: str,
    size: tuple[int, int],
    colour: tuple[int, int, int],
    font_size: int,
    font_file: Path | None,
    taken: list[_Plate],
) -> _Plate | None:
    """Draw a region's label; returns its plate, or None if no character is visible or the image is too small."""
    label = " ".join("".join(c if c.isprintable() else " " for c in phrase[:LABEL_CHARACTERS]).split())
    if not label:
        return None
    if len(phrase) > LABEL_CHARACTERS:
        label += "..."
    font, label = font_for(label, font_size, font_file)
    padding = max(1, font_size // 6)
    rim_width = max(1, font_size // 16)
    border = padding + rim_width
    ascent, descent = font.getmetrics()
    label = _shorten(label, font, size[0] - 2 * border)
    left, right = _extent(label, font)
    width, height = right - left + 2 * border, ascent + descent + 2 * border
    if not label or height > size[1]:
        warnings.warn(
            f"the image of {size[0]} x {size[1]} pixels is too small for labels of {font_size} pixels: drawn without.",
            stacklevel=3,
        )
        return None
    plate = _place(_candidates(region, width, height, size), taken)
    corners = (plate.left, plate.top, plate.right - 1, plate.bottom - 1)  # PIL includes both
    pen.rectangle(corners, fill=colour, outline=_rim(colour), width=rim_width)
    pen.text((plate.left + border - left, plate.top + border + ascent), label, _rim(colour), font, anchor="ls")
    return plate


def _extent(label: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """The label's ink from left to right, in pixels from its origin; letters may extend beyond their advance."""
    left, _, right, _ = font.getbbox(label, anchor="ls")
    return math.floor(left), math.ceil(right)


def _shorten(label: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The label, cut to at most `width` pixels with "..." at its end; "" if not even one character fits."""

    def fits(text: str) -> bool:
        left, right = _extent(text, font)
        return right - left <= width

    if fits(label):
        return label
    kept = len(label) - 1
    while kept and not fits(label[:kept].rstrip() + "..."):
        kept -= 1
    return label[:kept].rstrip() + "..." if kept else ""


def _candidates(region: Region, width: int, height: int, size: tuple[int, int]) -> Iterator[_Plate]:
    """Positions for a plate of `width` x `height` pixels, best first, all inside the image; there is at least one."""
    xs, ys = zip(*region.to_pixels(*size).points, strict=True)
    left, top, right, bottom = math.floor(min(xs)), math.floor(min(ys)), math.ceil(max(xs)), math.ceil(max(ys))
    # Aligned with the left edge or the right one; above, below, inside at the top, inside at the bottom; then rows
    # further away, alternately above and below.
    rows = [top - height, bottom, top, bottom - height]
    rows += [row for step in range(1, 6) for row in (top - (step + 1) * height, bottom + step * height)]
    for y in rows:
        for x in (left, right - width):
            x_inside = min(max(x, 0), size[0] - width)
            if 0 <= y <= size[1] - height:
                yield _Plate(x_inside, y, x_inside + width, y + height)
    # None of these exists if the region fills a flat image; this one always does.
    x, y = min(max(left, 0), size[0] - width), min(max(top, 0), size[1] - height)
    yield _Plate(x, y, x + width, y + height)


def _place(candidates: Iterable[_Plate], taken: list[_Plate]) -> _Plate:
    """The first candidate that covers no other label, or the one that covers least."""
    best: _Plate | None = None
    least = math.inf
    for candidate in candidates:
        covered = sum(candidate.overlap(other) for other in taken)
        if covered < least:
            best, least = candidate, covered
        if not covered:
            break
    assert best is not None, "there is always a candidate"
    return best
