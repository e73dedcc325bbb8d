"""Rules against encoded images that would take minutes to decode: checked on the bytes, before a decoder sees them.

Pixels are bounded elsewhere. What is bounded here takes time without being pixels: scans of a JPEG that repeat, data
of a PNG beyond its pixels, and headers that Pillow reads in Python, some of it in quadratic time. All limits are far
beyond what encoders write.
"""

import re
import struct
from collections.abc import Iterator

MOST_SCANS = 100
"""Scans of a JPEG. Encoders write 10 or so; each takes a pass over all blocks of the image."""
MOST_SCANNED = 2_000_000_000
"""Pixels of a JPEG times its scans, where it has more than `USUAL_SCANS`: 3 seconds."""
USUAL_SCANS = 16
MOST_SEGMENTS = 20_000
"""Segments of a JPEG before its pixels, chunks of a PNG beyond one for each thousand bytes."""
MOST_HEADER = 1 << 20
"""Bytes of a GIF or PPM before its pixels, and of padding in a JPEG."""
MOST_FRAMES = 10_000
"""Frames of an animation, pages of a TIFF: each is read in Python, and each needs those before it."""
TAGS_OF_A_PAGE = 100
"""Of a TIFF, on average, beyond `MOST_SEGMENTS` altogether."""
MOST_EXIF = 1 << 24
"""Bytes of EXIF data of a JPEG, over all its segments, which Pillow joins one by one."""

_PPM_HEADER = re.compile(rb"P[456](?:(?:[\x00\x09-\x0d ]|#[^\r\n]*+[\r\n])++\d++){2}")
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD9)))
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG's pixel, by colour type
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def too_costly(kind: str, data: bytes) -> str | None:
    """Why an image is not decoded: what in it would take too long; None where nothing would.

    Args:
        kind: Pillow's name of its format.
        data: the encoded image. A damaged one may pass: the decoder says what is wrong with it.
    """
    try:
        match kind:
            case "JPEG":
                return _jpeg(data)
            case "PNG":
                return _png(data)
            case "GIF":
                return _gif(data)
            case "PPM":
                is_long = len(data) > MOST_HEADER and not _PPM_HEADER.match(data[:MOST_HEADER])
                return f"its header is longer than {MOST_HEADER:,} bytes" if is_long else None
            case "TIFF":
                return _tags(data)
    except (IndexError, struct.error):  # it ends within a header
        pass
    return None


def exif_is_costly(exif: bytes) -> bool:
    """Whether EXIF data has entries that would be read into far more bytes than it has."""
    try:
        return _tags(exif.removeprefix(b"Exif\0\0")) is not None
    except (IndexError, struct.error):
        return False


def _jpeg(data: bytes) -> str | None:
    scans = segments = skipped = exif = 0
    pixels = 0
    for marker, start, length, gap in _jpeg_segments(data):
        segments, skipped = segments + 1, skipped + gap
        if marker == 0xDA:
            scans += 1
            if scans > MOST_SCANS or (scans > USUAL_SCANS and scans * pixels > MOST_SCANNED):
                return f"it is a JPEG of {scans:,} scans or more, each of which takes a pass over the whole image"
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, start + 5)
            pixels = height * width
        elif marker == 0xE1 and data.startswith(b"Exif", start + 4):
            exif += length
        if segments > MOST_SEGMENTS:
            return f"its header has more than {MOST_SEGMENTS:,} segments"
        if skipped > MOST_HEADER:
            return f"its header has more than {MOST_HEADER:,} bytes of padding"
        if exif > MOST_EXIF:
            return f"it has more than {MOST_EXIF:,} bytes of EXIF data"
    return None


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(marker, where it is, length, bytes skipped before it) of each segment up to the end of the image."""
    at, end = 2, len(data)
    while True:
        found = data.find(b"\xff", at)
        if found < 0:
            return
        after = found + 1
        while after < end and data[after] == 0xFF:
            step = 4096 if data[after : after + 4096] == b"\xff" * 4096 else 1
            after += step
            if after - at > 2 * MOST_HEADER:
                break
        if after >= end:
            return
        marker, gap = data[after], after - 1 - at
        if marker == 0:
            yield marker, after - 1, 2, gap
            at = after + 1
            continue
        if marker == 0xD9:
            return
        length = 0 if marker in _WITHOUT_LENGTH else struct.unpack_from(">H", data, after + 1)[0]
        yield marker, after - 1, length, gap
        at = after + 1 + length
        if marker == 0xDA:
            at = _after_scan(data, at)


_END_OF_SCAN = re.compile(rb"\xff++[^\x00\xd0-\xd7\xff]")


def _after_scan(data: bytes, at: int) -> int:
    """Where the entropy-coded data that begins at `at` ends."""
    found = _END_OF_SCAN.search(data, at)
    return len(data) if found is None else found.start()


def _png(data: bytes) -> str | None:
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    raw = height * (width * depth * _SAMPLES.get(colour, 4) // 8 + 2)
    at, chunks, compressed, profiles = 8, 0, 0, 0
    most = MOST_SEGMENTS + len(data) // 1000
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunks += 1
        compressed += length if kind == b"IDAT" else 0
        profiles += kind == b"iCCP"
        if chunks > most:
            return f"it is a PNG of more than {most:,} chunks"
        if kind == b"IEND":
            break
        at += 12 + length
    if profiles > 1:
        return "it has more than one colour profile, which a PNG cannot have"
    # Data that deflate makes no smaller grows by some bytes a block.
    if compressed > 2 * raw + (1 << 16):
        return f"its {compressed:,} bytes of compressed data are more than its pixels take without compression"
    return None


def _gif(data: bytes) -> str | None:
    flags = data[10]
    at = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    start, frames = at, 0
    while True:
        kind = data[at]
        if kind == 0x2C:
            frames += 1
            if frames > MOST_FRAMES:
                return f"it has more than {MOST_FRAMES:,} frames"
            flags = data[at + 9]
            at += 11 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)  # its colours, and the size of its codes
        elif kind == 0x21:
            at += 2
        elif kind == 0x3B:
            return None
        else:
            at += 1
            if not frames and at - start > MOST_HEADER:
                return f"it has more than {MOST_HEADER:,} bytes before its first picture"
            continue
        while data[at]:
            at += data[at] + 1
            if not frames and at - start > MOST_HEADER:
                return f"it has more than {MOST_HEADER:,} bytes before its first picture"
        at += 1


def _tags(data: bytes) -> str | None:
    """Of TIFF or EXIF data: whether it has far more entries than pages need, or these refer to far more bytes than it
    has."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return None
    is_big = struct.unpack_from(order + "H", data, 2)[0] == 43
    position, number = order + ("Q" if is_big else "I"), order + ("Q" if is_big else "H")
    entry = struct.Struct(order + ("HHQ8x" if is_big else "HHI4x"))
    at = struct.unpack_from(position, data, 8 if is_big else 4)[0]
    total = entries = 0
    seen: set[int] = set()
    while at and at not in seen and len(seen) <= MOST_FRAMES:
        seen.add(at)
        count = struct.unpack_from(number, data, at)[0]
        at += 8 if is_big else 2
        entries += count
        if entries > MOST_SEGMENTS + TAGS_OF_A_PAGE * len(seen):
            return f"it has more than {entries - 1:,} tags"
        for place in range(min(count, (len(data) - at) // entry.size)):
            _, kind, values = entry.unpack_from(data, at + place * entry.size)
            total += values * _TIFF_SIZES.get(kind, 0)
            if total > 4 * len(data) + MOST_HEADER:
                return "its tags refer to far more bytes than it has"
        at = struct.unpack_from(position, data, at + count * entry.size)[0]
    return None
