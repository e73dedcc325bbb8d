"""Boxes, quads and their labels drawn on an image, to look at data and replies.

    found = save_grounding(image, "<ref>the dog</ref><box>(120,80),(640,900)</box>", "reply.png")

A line is two-coloured: a colour, and around it a rim of black or white, whichever differs more from the colour. One of
the two differs from any background. Labels stand on a plate of the region's colour, their letters in the rim's colour.
"""

import math
import os
import secrets
import sys
import warnings
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from qwenvl.images.images import load_image
from qwenvl.text.boxes import Box
from qwenvl.text.grounding import Grounding, Region, parse_grounding

# Okabe and Ito's palette, told apart with any common colour blindness; without its black, which is a rim's colour.
PALETTE = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)

# Fonts to try first, by file name without extension: plain ones, then those with Chinese, Japanese and Korean.
PREFERRED_FONTS = (
    *("DejaVuSans", "NotoSans-Regular", "LiberationSans-Regular", "Arial", "segoeui", "Helvetica"),
    *("NotoSansCJK-Regular", "NotoSansCJKsc-Regular", "NotoSansSC-Regular", "SourceHanSansSC-Regular"),
    *("wqy-zenhei", "wqy-microhei", "DroidSansFallbackFull", "PingFang", "Hiragino Sans GB", "STHeiti Medium"),
    *("msyh", "simhei", "simsun", "YuGothM", "meiryo", "malgun", "AppleSDGothicNeo", "Arial Unicode", "unifont"),
)

MIN_FONT_SIZE = 10  # pixels; below this letters run together
LABEL_CHARACTERS = 200  # of a label that are looked at; more never fit beside a box


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
            return 0  # nearly always so; a page of text asks a million times
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

    Regions of one label share a colour. A label stands above its region where it fits, otherwise below or inside,
    clear of the labels already there where there is room; one that is wider than the image ends in "...".

    Args:
        image: any source that `images.load_image` takes, and seen as the model sees it; left as it is.
        regions: as `parse_grounding(text).regions` gives them.
        line_width: of the coloured line, pixels; by default 1/250 of the image's shorter side, at least 1.
        font_size: pixels; by default 1/36 of the shorter side, at least 10.
        font: a font file for the labels. By default the first font of this system that has a label's characters;
            where none has, those characters are drawn as "?" with a warning.

    Returns:
        An RGB image of the upright image's size; transparent parts are white.

    Raises:
        ValueError: a width or size below 1.
        ImageError: an image that cannot be read.
        OSError: `font` is not a font file.
    """
    if line_width is not None and line_width < 1:
        raise ValueError(f"line_width is {line_width}; it must be at least 1 pixel.")
    if font_size is not None and font_size < 1:
        raise ValueError(f"font_size is {font_size}; it must be at least 1 pixel.")
    canvas = load_image(image)
    shorter = min(canvas.size)
    line_width = line_width or max(1, round(shorter / 250))
    font_size = font_size or max(MIN_FONT_SIZE, round(shorter / 36))

    regions = list(regions)
    colours = {label: _colour(index) for index, label in enumerate(dict.fromkeys(region.label for region in regions))}
    pen = ImageDraw.Draw(canvas)
    for region in regions:
        _draw_outline(pen, region, canvas.size, colours[region.label], line_width)
    # All labels after all lines, so that no line crosses a label.
    plates: list[_Plate] = []
    for region in regions:
        if region.label is not None:
            plate = _draw_label(pen, region, canvas.size, colours[region.label], font_size, font, plates)
            plates += [plate] if plate else []
    return canvas


def save_grounding(image: Any, reply: str, path: str | os.PathLike, **drawing) -> Grounding:
    """Read a model's reply, draw what it points at, save the picture.

    The file appears under its name only when complete; one that was there before stays if anything fails.

    Args:
        image: the image the reply is about, as in `draw_regions`.
        reply: the model's text, decoded with its grounding tags.
        path: where to save; the extension gives the format.
        drawing: `line_width`, `font_size`, `font` of `draw_regions`.

    Returns:
        What was read. Its `problems` say what in the reply could not be drawn, or only after a repair.

    Raises:
        ValueError: the extension is no image format that can be written.
        FileNotFoundError: there is no such folder.
    """
    path = Path(path)
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format not in Image.SAVE:
        raise ValueError(f"{path.name!r} has no extension of an image format; use .png, .jpg or .webp.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} to save {path.name!r} in; create it first.")
    found = parse_grounding(reply)
    drawn = draw_regions(image, found.regions, **drawing)
    # Beside its goal, as a rename is only atomic within one file system.
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            drawn.save(file, format=image_format, quality=95)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return found


def _colour(index: int) -> tuple[int, int, int]:
    """The colour of the index-th label: the palette, then its darker and its lighter tones, then again."""
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
    """A box's line lies on the box's own outermost pixels, a quad's along its edges; the rim on both sides of it."""
    rim_width = max(1, line_width // 2)
    shape = region.to_pixels(*size)
    if isinstance(shape, Box):
        # A box without area still is one pixel. PIL's corners are both included.
        left, top = math.floor(shape.x1), math.floor(shape.y1)
        right, bottom = max(left, math.ceil(shape.x2) - 1), max(top, math.ceil(shape.y2) - 1)
        outside = (left - rim_width, top - rim_width, right + rim_width, bottom + rim_width)
        pen.rectangle(outside, outline=_rim(colour), width=line_width + 2 * rim_width)
        pen.rectangle((left, top, right, bottom), outline=colour, width=line_width)
    else:
        # Around once and one edge further, so that the first corner gets its joint too.
        path = [*shape.points, *shape.points[:2]]
        pen.line(path, fill=_rim(colour), width=line_width + 2 * rim_width, joint="curve")
        pen.line(path, fill=colour, width=line_width, joint="curve")


def _draw_label(
    pen: ImageDraw.ImageDraw,
    region: Region,
    size: tuple[int, int],
    colour: tuple[int, int, int],
    font_size: int,
    font_file: str | os.PathLike | None,
    taken: list[_Plate],
) -> _Plate | None:
    """Draw the region's label; where it stands, or None if it has no visible character or the image is too small."""
    label = " ".join("".join(c if c.isprintable() else " " for c in region.label[:LABEL_CHARACTERS]).split())
    if not label:
        return None
    if len(region.label) > LABEL_CHARACTERS:
        label += "..."
    font, label = _font_for(label, font_size, font_file)
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
    corners = (plate.left, plate.top, plate.right - 1, plate.bottom - 1)  # PIL's are both included
    pen.rectangle(corners, fill=colour, outline=_rim(colour), width=rim_width)
    pen.text((plate.left + border - left, plate.top + border + ascent), label, _rim(colour), font, anchor="ls")
    return plate


def _extent(label: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Where the ink of the label begins and ends from its origin, pixels; letters may reach over their own advance."""
    left, _, right, _ = font.getbbox(label, anchor="ls")
    return math.floor(left), math.ceil(right)


def _shorten(label: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The label, or as much of its beginning with "..." as is at most `width` pixels wide; "" if nothing is."""

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
    """Places for a plate of `width` x `height` pixels, best first, all inside the image of `size`."""
    xs, ys = zip(*region.to_pixels(*size).points, strict=True)
    left, top, right, bottom = math.floor(min(xs)), math.floor(min(ys)), math.ceil(max(xs)), math.ceil(max(ys))
    # Flush with the left edge or the right one; above, below, inside at the top, inside at the bottom; then rows
    # further away, above and below by turns.
    rows = [top - height, bottom, top, bottom - height]
    rows += [row for step in range(1, 6) for row in (top - (step + 1) * height, bottom + step * height)]
    for y in rows:
        for x in (left, right - width):
            x_inside = min(max(x, 0), size[0] - width)
            if 0 <= y <= size[1] - height:
                yield _Plate(x_inside, y, x_inside + width, y + height)
    # A region that fills a flat image leaves none of these; this one always exists.
    x, y = min(max(left, 0), size[0] - width), min(max(top, 0), size[1] - height)
    yield _Plate(x, y, x + width, y + height)


def _place(candidates: Iterable[_Plate], taken: list[_Plate]) -> _Plate:
    """The first candidate that covers no other label, or the one that covers least."""
    best, least = None, math.inf
    for candidate in candidates:
        covered = sum(candidate.overlap(other) for other in taken)
        if covered < least:
            best, least = candidate, covered
        if not covered:
            break
    return best


def font_folders() -> tuple[Path, ...]:
    """Where this system keeps its fonts, the user's own folders included; some may not exist."""
    home = Path.home()
    if sys.platform == "win32":
        windows = Path(os.environ.get("WINDIR", "C:/Windows"))
        local = Path(os.environ.get("LOCALAPPDATA", home / "AppData/Local"))
        return windows / "Fonts", local / "Microsoft/Windows/Fonts"
    if sys.platform == "darwin":
        return Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"
    data = Path(os.environ.get("XDG_DATA_HOME", home / ".local/share"))
    return Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), data / "fonts", home / ".fonts"


@cache
def font_files(folders: tuple[Path, ...]) -> tuple[Path, ...]:
    """Font files under the folders: the preferred ones in their order, then all others by name."""
    found = [
        Path(folder, name)
        for top in folders
        for folder, _, names in os.walk(top)
        for name in names
        if name.lower().endswith((".ttf", ".ttc", ".otf", ".otc"))
    ]
    rank = {name.lower(): place for place, name in enumerate(PREFERRED_FONTS)}
    return tuple(sorted(found, key=lambda path: (rank.get(path.stem.lower(), len(rank)), path.name, str(path))))


@lru_cache(maxsize=64)
def _load_font(file: Path | None, size: int) -> ImageFont.FreeTypeFont | None:
    """The font, Pillow's own for None; None if the file cannot be read as one."""
    if file is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(file, size)
    except OSError:
        return None


@cache
def has_glyph(file: Path | None, character: str) -> bool:
    """Whether a font (None: Pillow's own) draws the character, and not its sign for a missing one."""
    font = _load_font(file, 24)
    if font is None:
        return False
    try:
        # Pillow does not show a font's character map. U+10FFFF is no character, so no font has a glyph for it.
        drawn, missing = font.getmask(character), font.getmask("\U0010ffff")
    except OSError:  # a damaged font
        return False
    return character.isspace() or drawn.size != missing.size or bytes(drawn) != bytes(missing)


def _font_for(label: str, size: int, font_file: str | os.PathLike | None) -> tuple[ImageFont.FreeTypeFont, str]:
    """A font for the label, and the label with "?" for the characters that font does not have."""
    if font_file is None:
        file = _best_font(frozenset(label), font_folders())
    else:
        file = Path(font_file)
        if _load_font(file, size) is None:
            raise OSError(f"{str(file)!r} is not a font file that can be read; give a .ttf, .otf or .ttc file.")
    shown = "".join(character if has_glyph(file, character) else "?" for character in label)
    if shown != label:
        _warn_of_missing_glyphs(font_file)
    return _load_font(file, size), shown


@cache
def _best_font(characters: frozenset[str], folders: tuple[Path, ...]) -> Path | None:
    """The first font that has all the characters, else the one that lacks fewest; None is Pillow's own."""
    best, fewest = None, math.inf
    for file in (*font_files(folders), None):
        lacking = sum(not has_glyph(file, character) for character in characters)
        if lacking < fewest:
            best, fewest = file, lacking
        if not lacking:
            break
    return best


@cache  # once for each font asked for, however many labels there are
def _warn_of_missing_glyphs(font_file: str | os.PathLike | None) -> None:
    which = "no font found on this system has" if font_file is None else f"the font {str(font_file)!r} does not have"
    warnings.warn(
        f"{which} all characters of a label; the others are drawn as '?'. Install a font that has them (on Debian and "
        "Ubuntu: fonts-noto-cjk) or give one with font=.",
        stacklevel=5,
    )
