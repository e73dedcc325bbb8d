"""Images as files: whether a reference may be followed, the size of the image, its encoded bytes. Nothing is decoded.

Training opens images with `qwenvl.load_image`, which alone decides what may be reached. The same rules are applied
here to find a bad reference before training, at the cost of looking at the file's entry.
"""

import base64
import contextlib
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image

from finetune.data.sample import Sample
from finetune.errors import Interrupted, UserError
from qwenvl.images.image_decoding import check_kind, refuses_cost
from qwenvl.images.image_urls import UrlError, fetch
from qwenvl.images.images import ImageAccess, load_image

# Only formats whose header Pillow reads in this process, and that `load_image` decodes.
_HEADER_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_HEADER_BYTES = 1 << 16  # the header of most images is in them
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_URL = re.compile("https?:", re.IGNORECASE)
_DATA_URI = re.compile("data:", re.IGNORECASE)


def absolute(source: Any, root: Path) -> Any:
    """The source with its path, if it is one, made absolute: relative ones start at `root`. Nothing is opened."""
    if isinstance(source, Mapping):
        # The bytes are the image; the path is only a name.
        return dict(source)
    if not isinstance(source, str) or _is_url(source) or not source:
        return source
    return os.path.join(root, source)  # noqa: PTH118 (Path would fold the slashes by which a URL is known)


def check_image(source: Any, access: ImageAccess) -> None:
    """Check that an image may be read, as far as that is known before it is opened.

    A path must lead to a regular file within the root after links are followed. Bytes, data URIs and allowed URLs are
    not checked further.

    Raises:
        UserError: why not.
    """
    if isinstance(source, bytes | Mapping):
        return
    if not isinstance(source, str):
        raise UserError(f"a {type(source).__name__} is not an image source")
    if _DATA_URI.match(source):
        return
    if _URL.match(source):
        if not access.allow_urls:
            raise UserError(f"{_shown(source)} is a URL; download it, or allow URLs (data.allow_urls)")
        return
    _find(source, access)


def is_url(source: Any) -> bool:
    """Whether an image is on the web."""
    return isinstance(source, str) and bool(_URL.match(source))


def check_header(source: Any, access: ImageAccess) -> None:
    """Read the first bytes of an image: whether it is of a kind that is decoded, and nothing in its header is refused.

    Raises:
        UserError, UnusableImage: it cannot be read, or is not such an image.
    """
    if isinstance(source, str) and _is_url(source):
        return
    with _open(source, access) as file:
        check_kind(file.read(_HEADER_BYTES))


def image_paths(sample: Sample) -> Iterator[str]:
    """The paths of a sample's images that are files of their own."""
    for message in sample.messages:
        if not isinstance(message["content"], str):
            for part in message["content"]:
                if part["type"] == "image" and isinstance(part["image"], str) and not _is_url(part["image"]):
                    yield part["image"]


def file_size(path: str) -> int:
    """Bytes of a file; -1 where it cannot be looked at."""
    try:
        return Path(path).stat().st_size
    except (OSError, ValueError):
        return -1


def upright_size(source: Any, access: ImageAccess) -> tuple[int, int]:
    """(width, height) in pixels of an image after its EXIF rotation, as `load_image` would give it.

    JPEG, WebP, GIF, BMP, and PNG with EXIF at its head: from the file's header. Everything else is decoded.

    Raises:
        UserError, ImageError: it cannot be read.
    """
    try:
        size = _header_size(source, access)
    except Interrupted:
        raise
    except Exception:  # a damaged header may raise anything; decoding says what is wrong, or reads the image
        size = None
    if size is None or size[0] * size[1] > access.max_pixels:
        return load_image(source, access=access).size
    return size


def read_encoded(source: Any, access: ImageAccess) -> bytes:
    """The encoded bytes of an image, as they are stored.

    Raises:
        UserError, ImageError: they cannot be read.
    """
    if isinstance(source, str) and _DATA_URI.match(source):
        load_image(source, access=access)  # raises where it is not a well-formed data URI
        return base64.b64decode(source.partition(",")[2], validate=True)
    if isinstance(source, str) and _URL.match(source):
        check_image(source, access)
        try:
            return fetch(
                source,
                max_bytes=access.max_bytes,
                timeout=access.url_timeout,
                max_redirects=access.max_redirects,
                address_allowed=access.address_allowed,
            )
        except UrlError as error:
            raise UserError(f"{error.reason}; {error.remedy}") from error
    try:
        with _open(source, access) as file:
            data = file.read(access.max_bytes + 1)
    except OSError as error:
        raise UserError(f"{_shown(str(source))} cannot be read ({error.strerror})") from error
    if len(data) > access.max_bytes:
        raise UserError(f"it is longer than the {access.max_bytes:,} bytes allowed")
    return data


def _header_size(source: Any, access: ImageAccess) -> tuple[int, int] | None:
    """The size by the file's header alone; None where it does not say it."""
    if isinstance(source, str) and _is_url(source):
        return None
    with _open(source, access) as file:
        data = file.read(_HEADER_BYTES)
        if len(data) == _HEADER_BYTES and not data.startswith(b"RIFF"):  # WebP's decoder takes the whole file
            with contextlib.suppress(Exception):  # the header may be longer
                return _size_of(data)
        return _size_of(data + file.read(access.max_bytes))


def _size_of(data: bytes) -> tuple[int, int] | None:
    if refuses_cost(data):
        return None  # decoding says why
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` is the limit here
        image = Image.open(io.BytesIO(data), formats=_HEADER_FORMATS)
        # A PNG may have its EXIF after the pixels.
        if image.format == "PNG" and "exif" not in image.info:
            return None
        turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        return image.size[::-1] if turned else image.size


def _open(source: Any, access: ImageAccess) -> BinaryIO:
    if isinstance(source, Mapping):
        source = source["bytes"]
    if isinstance(source, bytes):
        return io.BytesIO(source)
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    return open(_find(source, access), "rb", opener=lambda path, mode: os.open(path, mode | flags))


def _find(path: str, access: ImageAccess) -> str:
    """The regular file that a path leads to after links are followed.

    Raises:
        UserError: there is none, or it may not be reached.
    """
    shown = _shown(path)
    if "://" in path:
        raise UserError(f"{shown} is a kind of URL that is not read; give a path, an http(s) URL or a data URI")
    if path.startswith(("//", "\\\\")):
        raise UserError(f"{shown} is a network path; mount the share and give a path on this machine")
    root = os.path.realpath(access.root or "")
    try:
        target = os.path.realpath(os.path.join(root, path), strict=True)  # noqa: PTH118
        info = os.lstat(target)
    except FileNotFoundError:
        raise UserError(f"there is no file {shown}") from None
    except OSError as error:
        raise UserError(f"{shown} cannot be reached ({error.strerror})") from error
    except ValueError:  # half a surrogate pair, or a null character
        raise UserError(f"{shown} has characters that no path can have") from None
    if access.root is not None and not Path(target).is_relative_to(root):
        raise UserError(f"{shown} lies outside {root}; move it inside, or set data.images_root to a wider folder")
    if not stat.S_ISREG(info.st_mode):
        raise UserError(f"{shown} is not a regular file")
    if info.st_size == 0:
        raise UserError(f"{shown} is empty")
    if info.st_size > access.max_bytes:
        raise UserError(f"{shown} has {info.st_size:,} bytes, more than the {access.max_bytes:,} allowed")
    return target


def _is_url(source: str) -> bool:
    return bool(_URL.match(source) or _DATA_URI.match(source))


def _shown(path: str) -> str:
    text = repr(path)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"
