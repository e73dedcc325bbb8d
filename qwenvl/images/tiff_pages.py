"""The pages of a TIFF file: its image file directories without the reduced copies and masks that belong to a page."""

import struct
from typing import BinaryIO

from qwenvl.images.image_bounds import MOST_FRAMES as MOST_DIRECTORIES
from qwenvl.images.unusable_image import UnusableImage

_KIND = 254
"""NewSubfileType (TIFF 6.0, section 8): bit 0 marks a reduced copy of another page, bit 2 a transparency mask."""
_COPY_OR_MASK = 0b101
_ENTRIES_READ = 16
"""Entries are sorted by tag, and no baseline tag is below `_KIND`."""


def tiff_pages(file: BinaryIO) -> list[int]:
    """The numbers of the directories that are pages, from 0, in their order; at least one.

    A directory that cannot be read, such as in a file that was cut off, counts as a page: nothing is left out.

    Raises:
        UnusableImage: more than `MOST_DIRECTORIES` directories.
    """
    file.seek(0)
    header = file.read(16)
    order = "<" if header[:2] == b"II" else ">"
    big = header[2:4] in (b"+\0", b"\0+")
    count_form, next_form, entry_bytes = (f"{order}Q", f"{order}Q", 20) if big else (f"{order}H", f"{order}I", 12)
    pages: list[int] = []
    seen: set[int] = set()
    try:
        (offset,) = struct.unpack_from(next_form, header, 8 if big else 4)
        while offset and offset not in seen:
            if len(seen) >= MOST_DIRECTORIES:
                raise UnusableImage(f"it has more than {MOST_DIRECTORIES:,} pages", "split it into several files")
            number = len(seen)
            seen.add(offset)
            pages.append(number)
            file.seek(offset)
            (count,) = struct.unpack(count_form, file.read(struct.calcsize(count_form)))
            first = file.read(min(count, _ENTRIES_READ) * entry_bytes)
            if _kind(first, order, entry_bytes) & _COPY_OR_MASK:
                pages.pop()
            file.seek(offset + struct.calcsize(count_form) + count * entry_bytes)
            (offset,) = struct.unpack(next_form, file.read(struct.calcsize(next_form)))
    except UnusableImage:
        raise
    except (struct.error, OSError, OverflowError, ValueError):  # cut off, or positions that no file has
        pass
    return pages or [0]


def _kind(entries: bytes, order: str, entry_bytes: int) -> int:
    """The value of NewSubfileType; 0 where a directory has none."""
    for start in range(0, len(entries) - entry_bytes + 1, entry_bytes):
        tag, kind = struct.unpack_from(f"{order}HH", entries, start)
        if tag == _KIND:
            value_form, value_place = ("H" if kind == 3 else "I"), start + (8 if entry_bytes == 12 else 12)
            return int(struct.unpack_from(f"{order}{value_form}", entries, value_place)[0])
    return 0
