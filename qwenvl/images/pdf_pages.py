"""Pages of PDF files -> RGB pixels, by pdfium (the package `pypdfium2`).

pdfium as that package builds it runs no JavaScript and fetches nothing. Fonts that a file does not embed are replaced
by those of the machine, so its pixels are the same on every machine only where fonts are embedded.

pdfium works for one thread at a time, so these are called where there is one: in the process that reads PDFs
(`pdf_worker`).
"""

import ctypes
import math
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from PIL import Image

from qwenvl.images.page_references import choose_page
from qwenvl.images.unusable_image import UnusableImage

if TYPE_CHECKING:
    import pypdfium2

SIGNATURE = re.compile(rb"[\0\s\xef\xbb\xbf]{0,64}%PDF-")
DPI = 150
"""Pixels an inch of a rendered page: A4 has 1241 x 1755."""
POINTS_PER_INCH = 72
LONGEST_SECONDS = 20.0
"""For drawing one page. Ordinary pages take less than a second."""


def count_pdf_pages(data: bytes) -> int:
    """The number of pages of a PDF; none is read.

    Raises:
        UnusableImage: encrypted or damaged, or without pages.
    """
    with _opened(data) as document:
        return _count(document)


def render_pdf_page(
    data: bytes, page: int | None, *, dpi: int = DPI, check_size: Any, seconds: float = LONGEST_SECONDS
) -> Image.Image:
    """Draw a page with its annotations and filled form fields, on white.

    Args:
        page: from 1; None for the only page.
        dpi: pixels an inch.
        check_size: called with (width, height) before any pixel is drawn; raises where that is too much.
        seconds: that drawing may take.

    Raises:
        UnusableImage: encrypted or damaged, no such page, several pages and none named, or drawing takes too long.
    """
    with _opened(data) as document:
        number = choose_page(page, _count(document))
        with _damage_named(number), closing(document[number - 1]) as opened:
            points = opened.get_size()
            if not all(math.isfinite(side) for side in points):
                raise UnusableImage(f"page {number} has no size", "save the file again, or drop it from the data")
            width, height = (max(1, math.ceil(side * dpi / POINTS_PER_INCH)) for side in points)
            try:
                check_size((width, height))
            except UnusableImage as error:
                raise UnusableImage(
                    f"page {number}: {error.reason}, at {dpi} dpi", "lower the dpi (data.pages.dpi)"
                ) from None
            return _draw(opened, width, height, number, seconds)


def _draw(page: "pypdfium2.PdfPage", width: int, height: int, number: int, seconds: float) -> Image.Image:
    import pypdfium2
    from pypdfium2 import raw

    ends = time.monotonic() + seconds
    with closing(pypdfium2.PdfBitmap.new_native(width, height, raw.FPDFBitmap_BGRx)) as bitmap:
        bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
        pause = raw.IFSDK_PAUSE(version=1)
        # pdfium asks this between the objects of a page.
        asked = type(pause.NeedToPauseNow)(lambda _: int(time.monotonic() > ends))
        pause.NeedToPauseNow = asked
        try:
            state = raw.FPDF_RenderPageBitmap_Start(
                bitmap, page, 0, 0, width, height, 0, raw.FPDF_ANNOT, ctypes.byref(pause)
            )
        finally:
            raw.FPDF_RenderPage_Close(page)
        if state == raw.FPDF_RENDER_TOBECONTINUED:
            raise UnusableImage(
                f"drawing page {number} takes more than {seconds:g} s",
                "it is no ordinary page: give it as an image, or drop it from the data",
            )
        if state != raw.FPDF_RENDER_DONE:
            raise UnusableImage(f"page {number} cannot be drawn", "save the file again, or drop it from the data")
        # BGRx -> RGB copies, so that nothing refers to the bitmap.
        return Image.frombuffer("RGB", (width, height), bytes(bitmap.buffer), "raw", "BGRX", bitmap.stride, 1)


def _count(document: "pypdfium2.PdfDocument") -> int:
    count = len(document)
    if count < 1:
        raise UnusableImage("it is a PDF without pages", "replace it, or drop it from the data")
    return count


@contextmanager
def _opened(data: bytes) -> "Iterator[pypdfium2.PdfDocument]":
    try:
        import pypdfium2
    except ImportError as error:
        raise UnusableImage(
            "it is a PDF, and the package that draws its pages is missing", "pip install pypdfium2"
        ) from error
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if error.err_code in (pypdfium2.raw.FPDF_ERR_PASSWORD, pypdfium2.raw.FPDF_ERR_SECURITY):
            raise UnusableImage(
                "it is an encrypted PDF", "save it without a password, such as with qpdf --decrypt IN OUT"
            ) from error
        raise UnusableImage(
            f"its PDF data cannot be read ({error})",
            "it is damaged or incomplete: replace it, or drop it from the data",
        ) from error
    with closing(document):
        yield document


@contextmanager
def _damage_named(number: int) -> Iterator[None]:
    import pypdfium2

    try:
        yield
    except pypdfium2.PdfiumError as error:
        raise UnusableImage(
            f"page {number} of the PDF cannot be read ({error})",
            "it is damaged: replace it, or drop it from the data",
        ) from error
