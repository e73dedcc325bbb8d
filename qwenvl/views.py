"""Views: an image as several pictures, the whole page and its parts, so that small text keeps its pixels.

    views = Views(page=True, grid=(2, 2), overlap=0.1)
    views.pictures("scan.png")    # ["scan.png", PagePart("scan.png", views, 1), ..., PagePart("scan.png", views, 4)]
    load_image(views.pictures("scan.png")[1])       # the upper left part

The model reads every picture as a square of some hundred pixels. A part of a page is enlarged to the same square, so a
grid of 2 x 2 shows text at nearly twice its size. Boxes are of the whole page, the first of the pictures. A model is
asked with the views that it was trained with: they are in its record (`qwenvl.json`), and `qwenvl.load_processor`
reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from qwenvl.errors import InputError

MOST_PARTS = 8
"""Rows, and columns, of a grid."""
MOST_OVERLAP = 0.5

CropBox = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom lie outside."""


@dataclass(frozen=True)
class Views:
    """What pictures an image becomes.

    Attributes:
        page: whether the whole page comes first.
        grid: rows and columns of the parts, which follow row by row.
        overlap: what neighbouring parts share, as a share of a part's side.

    Raises:
        InputError: a grid of 1 x 1, which is the page once more; values of other types or out of bounds.
    """

    page: bool = True
    grid: tuple[int, int] = (2, 2)
    overlap: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.page, bool):
            raise InputError(f"views: page must be true or false, not {self.page!r}")
        grid = tuple(self.grid) if isinstance(self.grid, list | tuple) else ()
        if len(grid) != 2 or not all(type(parts) is int and 1 <= parts <= MOST_PARTS for parts in grid):
            raise InputError(
                f"views: grid must be two numbers from 1 to {MOST_PARTS}, rows and columns, not {self.grid!r}"
            )
        if grid == (1, 1):
            raise InputError("views: a grid of 1 x 1 is the whole page: give more parts, or no views")
        if type(self.overlap) not in (int, float) or not 0 <= self.overlap <= MOST_OVERLAP:
            raise InputError(f"views: overlap must be a number from 0 to {MOST_OVERLAP}, not {self.overlap!r}")
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "overlap", float(self.overlap))

    @property
    def count(self) -> int:
        """Pictures of one image."""
        rows, columns = self.grid
        return rows * columns + self.page

    @property
    def scale(self) -> float:
        """How many sides of a part the longer-divided side of an image has: what a part is enlarged by."""
        return max(parts - (parts - 1) * self.overlap for parts in self.grid)

    def pictures(self, source: Any) -> list[Any]:
        """The sources of an image's pictures, in the order in which the model reads them: the page as it is given, and
        its parts row by row.

        Args:
            source: as `load_image` takes it; None for an image that is given later.
        """
        rows, columns = self.grid
        parts = [PagePart(source, self, number) for number in range(1, rows * columns + 1)]
        return [source, *parts] if self.page else list(parts)

    def crop_boxes(self, width: int, height: int) -> list[CropBox]:
        """The parts of an upright image, in pixels, row by row.

        Along a side of L pixels, n parts of length l with overlap o cover it exactly: n l - (n - 1) o l = L, and part
        i, from 0, begins at i (1 - o) l. In whole pixels a part begins at the floor of its beginning and ends at the
        ceiling of its end. So every pixel is in a part, and no part is empty, however small the image. Computed in
        integers: `overlap` counts as the decimal number that it is written as.
        """
        rows, columns = self.grid
        return [
            (left, top, right, bottom)
            for top, bottom in _spans(height, rows, self.overlap)
            for left, right in _spans(width, columns, self.overlap)
        ]

    def to_json(self) -> dict[str, Any]:
        """As records and recipes write it."""
        return {"page": self.page, "grid": list(self.grid), "overlap": self.overlap}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Views":
        """Read what `to_json` wrote.

        Raises:
            InputError: another key, one that is missing, or a value that is none.
        """
        if set(value) != {"page", "grid", "overlap"}:
            raise InputError(f"views: the keys are page, grid and overlap, not {', '.join(map(str, value)) or 'none'}")
        return cls(value["page"], value["grid"], value["overlap"])

    def __str__(self) -> str:
        """`the page and its 2 x 2 parts, overlap 0.1`"""
        rows, columns = self.grid
        of_page = "the page and its" if self.page else "the page's"
        return f"{of_page} {rows} x {columns} parts, overlap {self.overlap:g}"


@dataclass(frozen=True)
class PagePart:
    """A part of an image, as a source that `load_image` takes.

    Attributes:
        source: of the whole image; None for one that is given later.
        views: that it is a part by.
        number: of the part, from 1, row by row.
    """

    source: Any
    views: Views
    number: int

    @property
    def place(self) -> str:
        """Which part it is, the same for the same pixels: `part 2 of 2 x 2, overlap 0.1`."""
        rows, columns = self.views.grid
        return f"part {self.number} of {rows} x {columns}, overlap {self.views.overlap!r}"

    def box(self, width: int, height: int) -> CropBox:
        """Its pixels in the upright image."""
        return self.views.crop_boxes(width, height)[self.number - 1]


def whole_of(source: Any) -> Any:
    """The source of the whole image that a picture shows, or shows a part of."""
    return source.source if isinstance(source, PagePart) else source


def _spans(length: int, parts: int, overlap: float) -> list[tuple[int, int]]:
    share = Fraction(str(overlap))
    shared, whole = share.numerator, share.denominator
    step, divisor = whole - shared, parts * whole - (parts - 1) * shared
    return [(part * step * length // divisor, -(-(part * step + whole) * length // divisor)) for part in range(parts)]
