"""A decoded PIL image of any mode -> RGB, 8 bits a channel.

PIL's own `convert("RGB")` drops alpha, saturates 16 bits to white and turns floats in [0, 1] black. Here transparency
is composited on white and deep pixels are scaled. Opaque 8-bit images come out exactly as `convert("RGB")` gives them.
"""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from qwenvl.errors import InputError

_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")

# Pixels converted at a time: besides source and result, a conversion takes less than ~50 MB at any image size.
_STRIP_PIXELS = 1 << 22


def to_rgb(image: Image.Image, *, white: int | None = None) -> Image.Image:
    """Convert a loaded image to mode RGB; an image that is opaque RGB is returned as it is. `image` is not changed.

    - Alpha, transparent palette entries and transparent colours are composited on white.
    - 16-bit samples (I;16): 0..65535 become 0..255, rounded.
    - Integer samples without a stated depth (I): within 0..255 they are 8-bit levels, within 0..65535 16-bit ones.
      What a PGM or PPM file holds is 16-bit, as its decoder scales it.
    - Float samples (F): within 0..1 they are scaled by 255, within 0..255 they are levels, rounded.

    Args:
        white: the sample value that stands for white, if the file states one that the mode does not imply (12 bits).

    Raises:
        InputError: integer or float samples beyond those ranges, or not finite: their brightness is unknown, and
            stretching them would differ from image to image.
    """
    if image.mode in _DEEP_MODES:
        white = white or _white(image)
        return _by_strips(image, lambda strip: _scaled(strip, white))
    if image.has_transparency_data:
        return _by_strips(image, _on_white)
    if image.mode == "RGB":
        return image
    return image.convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(top row, the rows from there as an image) for each strip."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _by_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    result = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        result.paste(convert(strip), (0, top))
    return result


def _on_white(strip: Image.Image) -> Image.Image:
    if strip.mode == "La":  # premultiplied grey, which PIL converts to nothing else
        strip = strip.convert("LA")
    rgba = strip.convert("RGBA")
    canvas = Image.new("RGB", rgba.size, "white")
    canvas.paste(rgba, mask=rgba)
    return canvas


def _white(image: Image.Image) -> int:
    """The sample value of a deep image that stands for white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return 65535
    low, high = np.inf, -np.inf
    for _, strip in _strips(image):
        samples = np.asarray(strip)
        # np.minimum keeps a NaN, min() would lose it.
        low, high = np.minimum(low, samples.min()), np.maximum(high, samples.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError("it holds pixels that are not finite numbers")
    limits = (1, 255) if image.mode == "F" else (255, 65535)
    if low < 0 or high > limits[1]:
        kind = "float" if image.mode == "F" else "integer"
        raise InputError(
            f"its {kind} pixels run from {low:g} to {high:g}, and only 0..{limits[0]} and 0..{limits[1]} have a known "
            "brightness"
        )
    return limits[0] if high <= limits[0] else limits[1]


def _scaled(strip: Image.Image, white: int) -> Image.Image:
    samples = np.asarray(strip)
    if strip.mode == "F":
        levels = np.rint(samples * np.float32(255 / white))
    else:
        # Samples are below 2**16 here, so the product fits.
        levels = (samples.astype(np.uint32) * 255 + white // 2) // white
    levels = np.minimum(levels, 255).astype(np.uint8)
    transparent = strip.info.get("transparency")
    if isinstance(transparent, int):
        levels[samples == transparent] = 255
    return Image.fromarray(levels).convert("RGB")
