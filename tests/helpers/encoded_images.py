"""Image files made for the tests, by Pillow and by hand, and the pixels they must come out as."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, features

from qwenvl.images.images import load_image

AVIF = ("AVIF",) if features.check("avif") else ()


def noise(rng: np.random.Generator, *channels: int, width: int | None = None, height: int | None = None) -> np.ndarray:
    """(height, width, *channels) uint8, of a random size unless given."""
    return rng.integers(
        0, 256, (height or rng.integers(1, 24), width or rng.integers(1, 24), *channels), dtype=np.uint8
    )


def encode(pixels: np.ndarray | Image.Image, file_format: str = "PNG", **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, color: int, rows: bytes, *extra: bytes, claim: tuple = ()) -> bytes:
    """A PNG written by hand: `rows` with their filter bytes, `extra` chunks before the pixels."""
    header = struct.pack(">IIBBBBB", *(claim or (width, height)), bits, color, 0, 0, 0)
    body = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows, 1)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff(samples: np.ndarray, bits: int | None = None, data: bytes | None = None) -> bytes:
    """A grey TIFF written by hand, one strip, in the byte order and type of `samples`."""
    order = ">" if samples.dtype.byteorder == ">" else "<"
    height, width = samples.shape
    data = samples.tobytes() if data is None else data
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits or samples.itemsize * 8), (259, 3, 1), (262, 3, 1)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, kind)]
    directory = struct.pack(order + "H", len(tags))
    for tag, type_, value in tags:
        packed = struct.pack(order + "HH", value, 0) if type_ == 3 else struct.pack(order + "I", value)
        directory += struct.pack(order + "HHI", tag, type_, 1) + packed
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "I", 8 + len(data)) + data + directory + b"\0\0\0\0"


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Rounded compositing, exact in integers."""
    alpha = alpha[..., None].astype(int)
    return ((rgb.astype(int) * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def grey(levels: np.ndarray) -> np.ndarray:
    return np.stack([levels.astype(np.uint8)] * 3, -1)


def pil_rgb(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def pixels_of(source, **options) -> np.ndarray:
    image = load_image(source, **options)
    assert image.mode == "RGB" and image.info == {}
    return np.asarray(image)
