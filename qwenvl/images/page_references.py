"""A page of a file by its number, from 1: `scan.pdf#3`, `scan.tif#2`, `https://host.example/scan.pdf#3`."""

import os
import re
from pathlib import Path

from qwenvl.images.unusable_image import UnusableImage

_PAGE = re.compile(r"(?P<file>.*[^/\\])#(?P<page>[0-9]{1,9})", re.DOTALL)


def split_page(reference: str) -> tuple[str, int | None]:
    """The file and the page that a reference names; None where it names no page. Nothing is looked at."""
    match = _PAGE.fullmatch(reference) if "#" in reference else None
    return (reference, None) if match is None else (match["file"], int(match["page"]))


def find_page(reference: str, root: str | os.PathLike[str] | None) -> tuple[str, int | None]:
    """As `split_page`; a file whose own name ends in `#3` is that file.

    Args:
        root: where relative paths start.

    Raises:
        UnusableImage: a page 0, or there is both a file of that name and one with such a page.
    """
    file, page = split_page(reference)
    if page is None:
        return reference, None
    if os.path.lexists(Path(root or "", reference)):
        if os.path.lexists(Path(root or "", file)):
            raise UnusableImage(
                f"it may be the file of that name or page {page} of {Path(file).name!r}, which is there as well",
                "rename one of the two files",
            )
        return reference, None
    return file, check_page(page)


def check_page(page: int) -> int:
    """The page, which must be 1 or more.

    Raises:
        UnusableImage: it is not.
    """
    if isinstance(page, bool) or not isinstance(page, int) or page < 1:
        raise UnusableImage(f"page {page!r} is asked for, and pages are counted from 1", "write #1 for the first page")
    return page


def choose_page(page: int | None, count: int, kind: str = "page") -> int:
    """The page to read, from 1, of a file that has `count`.

    Args:
        page: as asked for; None where none was named.
        kind: what the file's pages are called.

    Raises:
        UnusableImage: it has several and none was named, or it has no such page.
    """
    if page is None and count > 1:
        raise UnusableImage(
            f"it has {count:,} {kind}s and one must be named, since none is left out silently",
            "write #1 after its path for the first one; data.pages of a recipe takes all as several images",
        )
    if page is not None and page > count:
        raise UnusableImage(
            f"{kind} {page:,} is asked for, and it has {count:,} {kind}{'s' if count != 1 else ''}",
            "correct the number after #",
        )
    return page or 1
