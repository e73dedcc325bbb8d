"""Encoded images -> RGB pixels, with decoders that run in this process (but for PDFs) and a limit on pixels."""

import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

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

from qwenvl.images import pdf_pages, pdf_process
from qwenvl.images.image_bounds import MOST_FRAMES, exif_is_costly, too_costly
from qwenvl.images.image_color import to_rgb
from qwenvl.images.page_references import choose_page
from qwenvl.images.pixel_limits import check_pixels
from qwenvl.images.tiff_pages import tiff_pages
from qwenvl.images.unusable_image import UnusableImage

# Pillow's name of a format, the first bytes of its files, and its decoder. Decoders are called directly, not through
# Image.open: that would try every registered plugin (EPS starts Ghostscript) and apply Pillow's pixel limit in place
# of the caller's. Left out: formats whose decoders start a program (EPS, WMF), open nested images before a size can be
# checked (ICO, ICNS), fill in missing data (JPEG 2000), or run pixel by pixel in Python (ASCII PNM).
_DECODERS: list[tuple[str, re.Pattern[bytes], type[ImageFile.ImageFile]]] = [
    ("JPEG", re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    ("WEBP", re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    ("GIF", re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    ("TIFF", re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), TiffImagePlugin.TiffImageFile),
    ("BMP", re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    ("PPM", re.compile(rb"P[456]\s"), PpmImagePlugin.PpmImageFile),
    ("AVIF", re.compile(rb"....ftyp(avif|avis|mif1....(....){0,16}?avif)", re.DOTALL), AvifImagePlugin.AvifImageFile),
]
_FORMATS = [name for name, _, _ in _DECODERS]

# Other content found in image fields, to be named in the message.
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

_OF_SEVERAL = ("TIFF", "GIF", "WEBP", "PNG", "AVIF")
"""Formats that can hold several pages or frames. (What a JPEG holds besides its picture are previews of it.)"""
_MOST_DRAWN = 300_000_000
"""Pixels that are decoded to reach a frame of an animation."""

_SAVE_AGAIN = "save it again with an image program, or drop it from the data"

_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, max_pixels: int, *, page: int | None = None, dpi: int = pdf_pages.DPI) -> Image.Image:
    """Decode an image, or a page of a PDF or TIFF: RGB, upright, on white.

    Args:
        page: of a file of several pages or frames, from 1; None for the only one.
        dpi: pixels an inch of a PDF's page.

    Raises:
        UnusableImage: not an image of a supported format, damaged, encrypted, or beyond `max_pixels`; several pages
            or frames and none named, or no such page.
    """
    if pdf_pages.SIGNATURE.match(data):
        return pdf_process.render_pdf_page(data, page, dpi=dpi, max_pixels=max_pixels)
    name, decoder = _checked_decoder(data)
    with _decoding(name, max_pixels):
        image = decoder(io.BytesIO(data))
        check_pixels(image.size, max_pixels)
        if frame := _frame(image, data, page, name):
            image.seek(frame)
            check_pixels(image.size, max_pixels)
        white = _correct_header(image)
        image.load()
    result = _upright_rgb(image, white)
    # The orientation and the transparent colour are applied: nobody may find and apply them again.
    result.info = {}
    return result


def check_kind(data: bytes) -> None:
    """Check by its first bytes that an image is of a kind that is decoded.

    Args:
        data: the encoded image or PDF, or its beginning.

    Raises:
        UnusableImage: it is not of a supported format, or would take too long to decode.
    """
    if not pdf_pages.SIGNATURE.match(data):
        _checked_decoder(data)


def refuses_cost(data: bytes) -> bool:
    """Whether `decode` refuses an image for the time that it would take, so that nothing of it should be read."""
    found = _find_decoder(data)
    return found is not None and too_costly(found[0], data) is not None


def count_pages(file: BinaryIO, max_pixels: int) -> int:
    """The number of pages or frames of an encoded image or PDF, by its structure; 1 for what cannot be decoded.

    Raises:
        UnusableImage: a PDF that is encrypted or damaged, an animation that is damaged, or one of too many frames.
    """
    file.seek(0)
    head = file.read(256)
    file.seek(0)
    if pdf_pages.SIGNATURE.match(head):
        return pdf_process.count_pdf_pages(file.read())
    found = _find_decoder(head)
    if found is None or found[0] not in _OF_SEVERAL:
        return 1
    if found[0] == "TIFF":
        return len(tiff_pages(file))
    data = file.read()
    if reason := too_costly(found[0], data):
        raise UnusableImage(reason, _SAVE_AGAIN)
    with _decoding(found[0], max_pixels):
        return _count_frames(found[1](io.BytesIO(data)))


def _checked_decoder(data: bytes) -> tuple[str, type[ImageFile.ImageFile]]:
    """As `_find_decoder`; raises `UnusableImage` as `check_kind`."""
    if not data:
        raise UnusableImage("it is empty (0 bytes)", "replace it, or drop it from the data")
    found = _find_decoder(data)
    if found is None:
        what = next((what for signature, what in _OTHER_CONTENT if signature.match(data)), "of an unknown kind")
        raise UnusableImage(
            f"its content is not an image this project reads but {what}",
            f"give one of {', '.join(_FORMATS)}, or a PDF",
        )
    if reason := too_costly(found[0], data):
        raise UnusableImage(reason, _SAVE_AGAIN)
    return found


def _find_decoder(data: bytes) -> tuple[str, type[ImageFile.ImageFile]] | None:
    return next(((name, decoder) for name, signature, decoder in _DECODERS if signature.match(data)), None)


def _frame(image: ImageFile.ImageFile, data: bytes, page: int | None, name: str) -> int:
    """The decoder's number, from 0, of the page or frame to read."""
    if name == "TIFF":
        pages = tiff_pages(io.BytesIO(data))
        return pages[choose_page(page, len(pages)) - 1]
    frame = choose_page(page, _count_frames(image), "frame") - 1
    # Each frame is drawn upon the ones before it.
    if (frame + 1) * image.width * image.height > _MOST_DRAWN and frame:
        raise UnusableImage(
            f"frame {frame + 1} comes after more than {_MOST_DRAWN:,} pixels of others", "save that frame by itself"
        )
    return frame


def _count_frames(image: ImageFile.ImageFile) -> int:
    count = getattr(image, "n_frames", 1)
    if count > MOST_FRAMES:
        raise UnusableImage(f"it has more than {MOST_FRAMES:,} frames", "save the frames that are used by themselves")
    return count


def rgb_from_image(image: Image.Image, max_pixels: int) -> Image.Image:
    """Convert a PIL image, decoded or not, as `decode` does; it is not changed, and the result is another image.

    Raises:
        UnusableImage: as `decode`.
    """
    check_pixels(image.size, max_pixels)
    if (
        isinstance(image, ImageFile.ImageFile)
        and image.format not in (*_FORMATS, "MPO")
        and (image.tile or isinstance(image, ImageFile.StubImageFile))
    ):
        # Not decoded yet, and decoding might start a program. If the caller has decoded it, only pixels are left.
        raise UnusableImage(f"{image.format} images are not decoded here", "call its load() first if you trust it")
    with _decoding(image.format or "pixel", max_pixels):
        image.load()
    result = _upright_rgb(image, None)
    if result is image:
        result = image.copy()
    result.info = {}
    return result


def _correct_header(image: ImageFile.ImageFile) -> int | None:
    """Correct what Pillow reads differently from what the file says; returns the argument `white` of `to_rgb`."""
    layout = image.tile[0][3] if image.tile else None
    layout = layout[0] if isinstance(layout, tuple) else layout
    key = image.info.get("transparency")
    # A PNG states its transparent colour in the file's samples, which Pillow has scaled or truncated to 8 bits.
    if layout in ("L;2", "L;4") and key is not None:
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[layout]
    if layout == "RGB;16B" and key is not None:
        raise UnusableImage(
            "it is a 16-bit PNG with a transparent colour, which cannot be told apart", "save it as RGBA"
        )
    return 4095 if layout == "I;12" else None


def _upright_rgb(image: Image.Image, white: int | None) -> Image.Image:
    orientation = None
    exif = image.info.get("exif")
    try:
        if not (isinstance(exif, bytes) and exif_is_costly(exif)):
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF can raise any exception, and the pixels are usable without it
        pass
    try:
        result = to_rgb(image, white=white)
    except Exception as error:
        raise UnusableImage(f"it cannot be shown as RGB: {error}", "save it as an 8-bit RGB image") from error
    if isinstance(orientation, int) and orientation in _ORIENTATIONS:
        return result.transpose(_ORIENTATIONS[orientation])
    return result


@contextmanager
def _decoding(kind: str, max_pixels: int) -> Iterator[None]:
    """Turn whatever a decoder raises into `UnusableImage`."""
    try:
        with _pillow_settings.strict(max_pixels):
            yield
    except UnusableImage:
        raise
    except Exception as error:  # decoders raise SyntaxError, struct.error, zlib.error, MemoryError, ...
        raise UnusableImage(
            f"its {kind} data cannot be decoded ({type(error).__name__}: {error})",
            "it is damaged or incomplete: replace it, or drop it from the data",
        ) from error


class _PillowSettings:
    """Two process-wide settings of Pillow, set while an image is decoded and restored when no thread decodes any more.

    `LOAD_TRUNCATED_IMAGES` must be off, or half an image passes for a whole one; some programs switch it on.
    `MAX_IMAGE_PIXELS` must not be below our own limit, which is checked before.
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
