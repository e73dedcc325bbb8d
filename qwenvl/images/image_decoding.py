"""Encoded images -> RGB pixels, by decoders that run in this process, within a number of pixels."""

import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from qwenvl.images.image_color import to_rgb

# What a format's files begin with, and its decoder. A decoder is called itself, not through Image.open: that would ask
# every registered plugin (EPS starts Ghostscript) and stop at Pillow's pixel limit instead of the caller's. Left out:
# formats whose decoders start a program (EPS, WMF), open nested images before a size can be checked (ICO, ICNS), fill
# in missing data (JPEG 2000), or run pixel by pixel in Python (ASCII PNM).
_DECODERS: list[tuple[re.Pattern[bytes], type[ImageFile.ImageFile]]] = [
    (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    (re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    (re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), TiffImagePlugin.TiffImageFile),
    (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    (re.compile(rb"P[456]\s"), PpmImagePlugin.PpmImageFile),
    (re.compile(rb"....ftyp(avif|avis|mif1....(....){0,16}?avif)", re.DOTALL), AvifImagePlugin.AvifImageFile),
]
_FORMATS = [decoder.format for _, decoder in _DECODERS]

# What else turns up in image fields, to be named in the message.
_OTHER_CONTENT = [
    (re.compile(rb"\s*<(!doctype html|html|head|body)", re.IGNORECASE), "an HTML page"),
    (re.compile(rb"\s*(<\?xml|<svg)", re.IGNORECASE), "SVG or other XML"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "PostScript"),
    (re.compile(rb"%PDF"), "a PDF"),
    (re.compile(rb"....ftyp", re.DOTALL), "HEIC or a video"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "JPEG 2000"),
    (re.compile(rb"\0\0\x01\0|icns"), "an icon"),
    (re.compile(rb"8BPS"), "a Photoshop file"),
    (re.compile(rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ"), "an archive"),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer: the file was not pulled"),
    (re.compile(rb"[\x09\x0a\x0d\x20-\x7e]{16}"), "text"),
]

# The longest side in pixels: each row costs memory of its own, so 100 million rows of one pixel are no small image.
_MAX_SIDE = 500_000

_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Refused(Exception):
    """Why an image cannot be had, before `qwenvl.images.images` adds which one.

    Attributes: `reason`, `remedy`.
    """

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason, remedy)
        self.reason, self.remedy = reason, remedy


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """An encoded image -> RGB, upright, on white, its first frame.

    Raises:
        Refused: not an image of a supported format, damaged, or beyond `max_pixels`.
    """
    if not data:
        raise Refused("it is empty (0 bytes)", "replace it, or drop it from the data")
    decoder = next((decoder for signature, decoder in _DECODERS if signature.match(data)), None)
    if decoder is None:
        what = next((what for signature, what in _OTHER_CONTENT if signature.match(data)), "of an unknown kind")
        raise Refused(
            f"its content is not an image this project reads but {what}", f"give one of {', '.join(_FORMATS)}"
        )
    with _decoding(decoder.format, max_pixels):
        image = decoder(io.BytesIO(data))
        check_pixels(image.size, max_pixels)
        white = _correct_header(image)
        image.load()
    result = _upright_rgb(image, white)
    # An orientation or a transparent colour that has been applied must not be found and applied again.
    result.info = {}
    return result


def rgb_from_image(image: Image.Image, max_pixels: int) -> Image.Image:
    """The same of a PIL image, decoded or not; it is not changed, and the result is another image.

    Raises:
        Refused: as `decode` does.
    """
    check_pixels(image.size, max_pixels)
    foreign = isinstance(image, ImageFile.ImageFile) and image.format not in (*_FORMATS, "MPO")
    if foreign and (image.tile or isinstance(image, ImageFile.StubImageFile)):
        # Not decoded yet, and decoding might start a program. What its owner has decoded is only pixels.
        raise Refused(f"{image.format} images are not decoded here", "call its load() first if you trust it")
    with _decoding(image.format or "pixel", max_pixels):
        image.load()
    result = _upright_rgb(image, None)
    if result is image:
        result = image.copy()
    result.info = {}
    return result


def check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    """Raises Refused for a (width, height) beyond the limits, or of no pixels."""
    width, height = size
    if width * height > max_pixels or max(size) > _MAX_SIDE:
        raise Refused(
            f"it has {width} x {height} pixels, more than {max_pixels} in all or {_MAX_SIDE} a side",
            "shrink it, or raise max_pixels",
        )
    if width * height == 0:
        raise Refused(f"it has {width} x {height} pixels", "replace it, or drop it from the data")


def _correct_header(image: ImageFile.ImageFile) -> int | None:
    """Put right what Pillow reads otherwise than the file says; returns `to_rgb`'s `white`."""
    layout = image.tile[0][3] if image.tile else None
    layout = layout[0] if isinstance(layout, tuple) else layout
    key = image.info.get("transparency")
    # A PNG's transparent colour is in the file's own samples, which Pillow has scaled to 8 bits or cut down to them.
    if layout in ("L;2", "L;4") and key is not None:
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[layout]
    if layout == "RGB;16B" and key is not None:
        raise Refused("it is a 16-bit PNG with a transparent colour, which cannot be told apart", "save it as RGBA")
    return 4095 if layout == "I;12" else None


def _upright_rgb(image: Image.Image, white: int | None) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF raises anything at all, and the pixels are still the image
        orientation = None
    try:
        result = to_rgb(image, white=white)
    except Exception as error:
        raise Refused(f"it cannot be shown as RGB: {error}", "save it as an 8-bit RGB image") from error
    if isinstance(orientation, int) and orientation in _ORIENTATIONS:
        return result.transpose(_ORIENTATIONS[orientation])
    return result


@contextmanager
def _decoding(kind: str, max_pixels: int) -> Iterator[None]:
    """Whatever a decoder raises becomes a refusal."""
    try:
        with _pillow_settings.strict(max_pixels):
            yield
    except Refused:
        raise
    except Exception as error:  # decoders raise SyntaxError, struct.error, zlib.error, MemoryError, ...
        raise Refused(
            f"its {kind} data cannot be decoded ({type(error).__name__}: {error})",
            "it is damaged or incomplete: replace it, or drop it from the data",
        ) from error


class _PillowSettings:
    """Two process-wide settings of Pillow, as they must be while an image is decoded, put back after the last of the
    threads that decode.

    `LOAD_TRUNCATED_IMAGES` must be off, or half an image passes for a whole one; some programs switch it on.
    `MAX_IMAGE_PIXELS` must not be below our own limit, which has been checked by then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._decoding = 0

    @contextmanager
    def strict(self, max_pixels: int) -> Iterator[None]:
        with self._lock:
            if self._decoding == 0:
                self._truncated, self._limit = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
            self._decoding += 1
            ImageFile.LOAD_TRUNCATED_IMAGES = False
            if Image.MAX_IMAGE_PIXELS is not None:
                Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
        try:
            yield
        finally:
            with self._lock:
                self._decoding -= 1
                if self._decoding == 0:
                    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = self._truncated, self._limit


_pillow_settings = _PillowSettings()
