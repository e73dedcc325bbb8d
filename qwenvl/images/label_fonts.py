"""Fonts for labels: the first font of this system that has all characters of a label."""

import math
import os
import sys
import warnings
from functools import cache, lru_cache
from pathlib import Path

from PIL import ImageFont

from qwenvl.errors import InputError

# Fonts to try first, by file name without extension: plain ones, then those with Chinese, Japanese and Korean.
PREFERRED_FONTS = (
    *("DejaVuSans", "NotoSans-Regular", "LiberationSans-Regular", "Arial", "segoeui", "Helvetica"),
    *("NotoSansCJK-Regular", "NotoSansCJKsc-Regular", "NotoSansSC-Regular", "SourceHanSansSC-Regular"),
    *("wqy-zenhei", "wqy-microhei", "DroidSansFallbackFull", "PingFang", "Hiragino Sans GB", "STHeiti Medium"),
    *("msyh", "simhei", "simsun", "YuGothM", "meiryo", "malgun", "AppleSDGothicNeo", "Arial Unicode", "unifont"),
)


def font_folders() -> tuple[Path, ...]:
    """The folders in which this system keeps fonts, the user's own included; some may not exist."""
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
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont), "what Pillow loads when it is given a size"
        return font
    try:
        return ImageFont.truetype(file, size)
    except OSError:
        return None


@cache
def has_glyph(file: Path | None, character: str) -> bool:
    """Whether a font (None: Pillow's own) has a glyph for the character."""
    font = _load_font(file, 24)
    if font is None:
        return False
    try:
        # Pillow does not expose a font's character map. U+10FFFF is no character, so it is drawn as a missing glyph.
        drawn, missing = font.getmask(character), font.getmask("\U0010ffff")
    except OSError:  # a damaged font
        return False
    return character.isspace() or drawn.size != missing.size or bytes(drawn) != bytes(missing)


def font_for(label: str, size: int, font_file: Path | None) -> tuple[ImageFont.FreeTypeFont, str]:
    """Choose a font for a label.

    Args:
        label: the text to draw.
        size: pixels.
        font_file: the font to use; None for the first one of this system that has all characters.

    Returns:
        The font, and the label with "?" for the characters that the font does not have.

    Raises:
        InputError: `font_file` is not a font file.
    """
    file = _best_font(frozenset(label), font_folders()) if font_file is None else font_file
    font = _load_font(file, size)
    if font is None:
        raise InputError(f"{str(file)!r} is not a font file that can be read; give a .ttf, .otf or .ttc file.")
    shown = "".join(character if has_glyph(file, character) else "?" for character in label)
    if shown != label:
        _warn_of_missing_glyphs(font_file)
    return font, shown


@cache
def _best_font(characters: frozenset[str], folders: tuple[Path, ...]) -> Path | None:
    """The first font that has all the characters, else the one that lacks fewest; None is Pillow's own."""
    best, fewest = None, math.inf
    for file in (*font_files(folders), None):
        lacking = sum(not has_glyph(file, character) for character in characters)
        if lacking < fewest and _load_font(file, 24) is not None:
            best, fewest = file, lacking
        if not lacking:
            break
    return best


@cache  # once for each font asked for, however many labels there are
def _warn_of_missing_glyphs(font_file: Path | None) -> None:
    which = "no font found on this system has" if font_file is None else f"the font {str(font_file)!r} does not have"
    warnings.warn(
        f"{which} all characters of a label; the others are drawn as '?'. Install a font that has them (on Debian and "
        "Ubuntu: fonts-noto-cjk) or give one with font=.",
        stacklevel=5,
    )
