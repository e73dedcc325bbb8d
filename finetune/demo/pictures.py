"""What a visitor uploads: images, and the pages of PDF and TIFF files to choose from.

A file is read once and held as it was sent; the page in the browser gets small copies of it. Files of visitors are
untrusted: `load_image` decodes them, within bounds.
"""

import io
import secrets
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.errors import InputError, UserError
from qwenvl import ImageAccess, load_image
from qwenvl.images.drawing import draw_regions
from qwenvl.images.image_decoding import count_pages
from qwenvl.images.unusable_image import UnusableImage
from qwenvl.text.grounding import Region

MOST_BYTES = 50_000_000
"""Of an uploaded file."""
ACCESS = ImageAccess(max_bytes=MOST_BYTES, max_pixels=64_000_000)
MOST_OFFERED = 200
"""Images and pages that one visitor is offered at the same time."""
MOST_HELD = 4 * MOST_BYTES
"""Bytes of one visitor's files at the same time."""
PAGES_AT_ONCE = 12
"""Pages of a file that are offered first, and with each further step."""
THUMBNAIL, SHOWN = 240, 1400  # pixels of the longer side
THUMBNAIL_DPI = 30  # of pages: A4 has 248 x 351 pixels


@dataclass(frozen=True)
class Upload:
    """A file that a visitor sent.

    Attributes:
        name: of the file.
        data: its bytes.
        pages: how many it has; 1 for an image.
    """

    name: str
    data: bytes
    pages: int


@dataclass(frozen=True)
class Offered:
    """An image, or a page of a file, that can be put into a message.

    Attributes:
        upload: where it is from.
        page: from 1; None for an image by itself.
        thumbnail: a small copy in the folder of the page's files.
    """

    upload: Upload
    page: int | None
    thumbnail: Path

    @property
    def name(self) -> str:
        """`scan.pdf, page 3`"""
        return self.upload.name if self.page is None else f"{self.upload.name}, page {self.page}"

    @property
    def source(self) -> Any:
        """As `load_image` takes it, with `ACCESS`."""
        return {"bytes": self.upload.data, "page": self.page}


@dataclass(frozen=True)
class Picture:
    """An image of a message.

    Attributes:
        name: as `Offered.name`.
        source: as `Offered.source`.
        size: width and height of the upright image in pixels.
        shown: a copy that fits into the page, in the folder of its files.
    """

    name: str
    source: Any
    size: tuple[int, int]
    shown: Path


def read_upload(name: str, data: bytes) -> Upload:
    """An uploaded file, of which only the number of pages is known so far.

    Raises:
        UserError: it is empty or too large, or its pages cannot be counted.
    """
    if not data:
        raise UserError(f"{name}: the file is empty")
    if len(data) > MOST_BYTES:
        raise UserError(f"{name}: the file is larger than {MOST_BYTES // 1_000_000} MB: give a smaller one")
    try:
        return Upload(name, data, count_pages(io.BytesIO(data), ACCESS.max_pixels))
    except UnusableImage as error:
        raise UserError(f"{name}: {error.reason}") from error


def offer(upload: Upload, folder: Path, first: int = 1) -> list[Offered]:
    """Offer an image, or the next pages of a file.

    Args:
        folder: of the small copies.
        first: the page to begin with, of a file with several; `PAGES_AT_ONCE` of them are offered.

    Raises:
        UserError: it cannot be read.
    """
    if upload.pages == 1:
        return [_offered(upload, None, folder)]
    last = min(upload.pages, first + PAGES_AT_ONCE - 1)
    return [_offered(upload, page, folder) for page in range(first, last + 1)]


def _offered(upload: Upload, page: int | None, folder: Path) -> Offered:
    access = ImageAccess(max_bytes=MOST_BYTES, max_pixels=ACCESS.max_pixels, dpi=THUMBNAIL_DPI)
    image = _load(upload.name, {"bytes": upload.data, "page": page}, access)
    return Offered(upload, page, small_copy(image, folder, THUMBNAIL))


def take(offered: Offered, folder: Path) -> Picture:
    """What was offered, as an image of a message.

    Raises:
        UserError: it cannot be read.
    """
    image = _load(offered.name, offered.source, ACCESS)
    return Picture(offered.name, offered.source, image.size, small_copy(image, folder, SHOWN))


def draw(picture: Picture, regions: tuple[Region, ...], folder: Path) -> Path:
    """A copy of a picture with boxes and quads drawn on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a label without room, or a character without a font
        drawn = draw_regions(_load(picture.name, picture.source, ACCESS), regions)
    return small_copy(drawn, folder, SHOWN)


def small_copy(image: Image.Image, folder: Path, longest: int) -> Path:
    """Write a copy that is no longer than so many pixels, under a name that cannot be guessed."""
    image = image.copy()
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    path = folder / f"{secrets.token_hex(16)}.jpg"
    image.save(path, "JPEG", quality=92, subsampling=0)
    return path


def _load(name: str, source: Any, access: ImageAccess) -> Image.Image:
    try:
        return load_image(source, access=access)
    except InputError as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"{name}: {reason}") from error
