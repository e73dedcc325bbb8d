"""Images as files: that a reference may be followed, how large the image is, its encoded bytes. Nothing is decoded.

Training opens images with `qwenvl.load_image`, which decides alone what is reached. Here the same rules find a
bad reference before training begins, for the price of a look into the folder.
"""

import base64
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
from qwenvl.images.image_urls import UrlError, fetch
from qwenvl.images.images import ImageAccess, ImageError, load_image

# Only formats whose header Pillow reads in this process, and that `load_image` decodes.
_HEADER_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_URL = re.compile("https?:", re.IGNORECASE)
_DATA_URI = re.compile("data:", re.IGNORECASE)


def absolute(source: Any, root: Path) -> Any:
    """The source with its path, if it is one, made absolute: relative ones start at `root`. Nothing is opened."""
    if isinstance(source, Mapping):
        # Its bytes are the image; the path beside them is only a name.
        return dict(source)
    if not isinstance(source, str) or _is_url(source) or not source:
        return source
    return os.path.join(root, source)  # noqa: PTH118 (Path would fold the slashes by which a URL is known)


def check_image(source: Any, access: ImageAccess) -> None:
    """Whether an image may be had, as far as that is known before it is opened.

    A path must lead to a regular file within the root, links followed. Bytes, data URIs and URLs that are allowed are
    taken as they are.

    Raises:
        ValueError: why not.
    """
    if isinstance(source, bytes | Mapping):
        return
    if not isinstance(source, str):
        raise ValueError(f"a {type(source).__name__} is not an image source")
    if _DATA_URI.match(source):
        return
    if _URL.match(source):
        if not access.allow_urls:
            raise ValueError(f"{_shown(source)} is a URL; download it, or allow URLs (data.allow_urls)")
        return
    _find(source, access)


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
        ValueError: the image cannot be had.
    """
    try:
        size = _header_size(source, access)
    except Exception:  # headers raise anything at all; decoding finds out what is wrong, or reads what this could not
        size = None
    if size is None or size[0] * size[1] > access.max_pixels:
        try:
            return load_image(source, access=access).size
        except ImageError as error:
            raise ValueError(str(error)) from error
    return size


def read_encoded(source: Any, access: ImageAccess) -> bytes:
    """The encoded bytes of an image, as they are stored.

    Raises:
        ValueError: they cannot be had.
    """
    if isinstance(source, str) and _DATA_URI.match(source):
        load_image(source, access=access)  # which is strict about what a data URI is
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
            raise ValueError(f"{error.reason}; {error.remedy}") from error
    try:
        with _open(source, access) as file:
            data = file.read(access.max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{_shown(str(source))} cannot be read ({error.strerror})") from error
    if len(data) > access.max_bytes:
        raise ValueError(f"it is longer than the {access.max_bytes:,} bytes allowed")
    return data


def _header_size(source: Any, access: ImageAccess) -> tuple[int, int] | None:
    """From the header alone; None where it does not tell."""
    if isinstance(source, str) and _is_url(source):
        return None
    with _open(source, access) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` is the limit here
        image = Image.open(file, formats=_HEADER_FORMATS)
        # A PNG may have its EXIF behind the pixels.
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
    """The regular file that a path leads to, links followed.

    Raises:
        ValueError: there is none, or it may not be reached.
    """
    shown = _shown(path)
    if "://" in path:
        raise ValueError(f"{shown} is a kind of URL that is not read; give a path, an http(s) URL or a data URI")
    if path.startswith(("//", "\\\\")):
        raise ValueError(f"{shown} is a network path; mount the share and give a path on this machine")
    root = os.path.realpath(access.root or "")
    try:
        target = os.path.realpath(os.path.join(root, path), strict=True)  # noqa: PTH118
        if access.root is not None and not Path(target).is_relative_to(root):
            raise ValueError(f"{shown} lies outside {root}; move it inside, or set data.images_root to a wider folder")
        info = os.lstat(target)
    except FileNotFoundError:
        raise ValueError(f"there is no file {shown}") from None
    except OSError as error:
        raise ValueError(f"{shown} cannot be reached ({error.strerror})") from error
    except UnicodeError:
        raise ValueError(f"{shown} has characters that no path can have") from None
    if not stat.S_ISREG(info.st_mode):
        raise ValueError(f"{shown} is no regular file")
    if info.st_size == 0:
        raise ValueError(f"{shown} is empty")
    if info.st_size > access.max_bytes:
        raise ValueError(f"{shown} has {info.st_size:,} bytes, more than the {access.max_bytes:,} allowed")
    return target


def _is_url(source: str) -> bool:
    return bool(_URL.match(source) or _DATA_URI.match(source))


def _shown(path: str) -> str:
    text = repr(path)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"
