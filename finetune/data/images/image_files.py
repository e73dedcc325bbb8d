"""Images as files: whether a reference may be followed, the size of the image, its encoded bytes. Nothing is decoded.

Training opens images with `qwenvl.load_image`, which alone decides what may be reached. The same rules are applied
here to find a bad reference before training, at the cost of looking at the file's entry.
"""

import io
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image

from finetune.data.images.image_paths import hint, meant_path
from finetune.data.message_parts import image_sources
from finetune.data.sample import Sample
from finetune.errors import UserError
from qwenvl.images import image_decoding, pdf_pages
from qwenvl.images.image_decoding import check_kind, refuses_cost
from qwenvl.images.image_urls import UrlError, is_data_uri, is_url
from qwenvl.images.images import ImageAccess, ImageError, data_uri_bytes, load_image, open_resolved, url_bytes
from qwenvl.images.page_references import choose_page, find_page, split_page
from qwenvl.images.unusable_image import UnusableImage

# Only formats whose header Pillow reads in this process, and that `load_image` decodes.
_HEADER_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_HEADER_BYTES = 1 << 16  # the header of most images is in them
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# Files that usually have several pages or frames: these are counted where a path is checked. A PNG or WebP that is an
# animation is found when it is decoded.
_OFTEN_SEVERAL = (".pdf", ".tif", ".tiff", ".gif")


def absolute(source: Any, root: Path) -> Any:
    """The source with its path, if it is one, made absolute: relative ones start at `root`, and those that another
    system wrote are read as `image_paths.meant_path` says. Nothing is opened."""
    if isinstance(source, Mapping):
        # The bytes are the image; the path is only a name.
        return dict(source)
    if not isinstance(source, str) or not source or is_url(source) or is_data_uri(source):
        return source
    return meant_path(source, root)


def check_image(source: Any, access: ImageAccess) -> None:
    """Check that an image may be read, as far as that is known before it is opened.

    A path must lead to a regular file within the root after links are followed, and of a PDF, TIFF or GIF name one
    page where there are several. Bytes, data URIs and allowed URLs are not checked further.

    Raises:
        UserError: why not.
    """
    if isinstance(source, bytes | Mapping):
        return
    if not isinstance(source, str):
        raise UserError(f"a {type(source).__name__} is not an image source")
    if is_data_uri(source):
        return
    if is_url(source):
        if not access.allow_urls:
            raise UserError(f"{_shown(source)} is a URL; download it, or allow URLs (data.allow_urls)")
        return
    target, page, info = _find(source, access)
    if page is not None or target.lower().endswith(_OFTEN_SEVERAL):
        try:
            choose_page(page, _pages_of_file(target, access, info.st_size, info.st_mtime_ns))
        except UnusableImage as error:
            raise UserError(f"{_shown(source)}: {error}") from None


def named_page(source: Any, access: ImageAccess) -> int | None:
    """The page that an image source names, from 1; None where it names none.

    Raises:
        UserError: it may name a file or a page of another one.
    """
    if isinstance(source, Mapping):
        return source.get("page")
    if not isinstance(source, str) or "#" not in source or is_data_uri(source):
        return None
    if is_url(source):
        return split_page(source)[1]
    try:
        return find_page(source, access.root)[1]
    except UnusableImage as error:
        raise UserError(f"{_shown(source)}: {error}") from None


def count_pages(source: Any, access: ImageAccess) -> int:
    """The number of pages or frames of an image, by the structure of its file; 1 for a URL, which is not opened.

    Raises:
        UserError: the file cannot be read, or it is an encrypted or damaged PDF.
    """
    if is_url(source):
        check_image(source, access)
        return 1
    try:
        if isinstance(source, bytes | Mapping) or is_data_uri(source):
            data = read_encoded(source, access) if isinstance(source, str) else _bytes_of(source)
            return image_decoding.count_pages(io.BytesIO(data), access.max_pixels)
        target, _, info = _find(source, access)
        return _pages_of_file(target, access, info.st_size, info.st_mtime_ns)
    except UnusableImage as error:
        named = f"{_shown(source)}: " if isinstance(source, str) else ""
        raise UserError(f"{named}{error}") from None


@lru_cache(maxsize=4096)
def _pages_of_file(target: str, access: ImageAccess, size: int, changed: int) -> int:
    """The pages of a file; `size` and `changed` tell its versions apart."""
    with _opened_file(target, access) as file:
        return image_decoding.count_pages(file, access.max_pixels)


def check_header(source: Any, access: ImageAccess) -> None:
    """Read the first bytes of an image: whether it is of a kind that is decoded, and nothing in its header is refused.

    Raises:
        UserError, UnusableImage: it cannot be read, or is not such an image.
    """
    if is_url(source) or is_data_uri(source):
        return
    with _opened(source, access) as file:
        check_kind(file.read(_HEADER_BYTES))


def image_paths(sample: Sample) -> Iterator[str]:
    """The paths of a sample's images that are files of their own."""
    for source in image_sources(sample.messages):
        if isinstance(source, str) and not is_url(source) and not is_data_uri(source):
            yield source


def file_size(path: str) -> int:
    """Bytes of a file, which may be named with a page; -1 where it cannot be looked at."""
    for file in dict.fromkeys((path, split_page(path)[0])):
        try:
            return Path(file).stat().st_size
        except (OSError, ValueError):
            continue
    return -1


def upright_size(source: Any, access: ImageAccess) -> tuple[int, int]:
    """(width, height) in pixels of an image after its EXIF rotation, as `load_image` would give it.

    JPEG, WebP, GIF, BMP, and PNG with EXIF at its head: from the file's header. Everything else is decoded.

    Raises:
        UserError, ImageError: it cannot be read.
    """
    try:
        size = _header_size(source, access)
    except Exception:  # a damaged header may raise anything; decoding says what is wrong, or reads the image
        size = None
    if size is None or size[0] * size[1] > access.max_pixels:
        return load_image(source, access=access).size
    return size


def read_encoded(source: Any, access: ImageAccess) -> bytes:
    """The encoded bytes of an image, as they are stored; of a page, and of a PDF, a PNG with the same pixels.

    Raises:
        UserError, ImageError: they cannot be read.
    """
    page = named_page(source, access)
    if is_data_uri(source):
        try:
            data = data_uri_bytes(source, access)
        except UnusableImage as error:
            raise ImageError(f"data URI of {len(source)} bytes", error.reason, error.remedy) from error
    elif is_url(source):
        check_image(source, access)
        try:
            data = url_bytes(split_page(source)[0], access)
        except UrlError as error:
            raise UserError(f"{error.reason}; {error.remedy}") from error
    else:
        with _opened(source, access) as file:
            data = file.read(access.max_bytes + 1)
    if len(data) > access.max_bytes:
        raise UserError(f"it is longer than the {access.max_bytes:,} bytes allowed")
    if page is None and not pdf_pages.SIGNATURE.match(data):
        return data
    png = io.BytesIO()
    load_image(data, access=access, page=page).save(png, "PNG")
    return png.getvalue()


def _bytes_of(source: bytes | Mapping[str, Any]) -> bytes:
    return source if isinstance(source, bytes) else source["bytes"]


def _header_size(source: Any, access: ImageAccess) -> tuple[int, int] | None:
    """The size by the file's header alone; None where it does not say it."""
    if is_url(source) or is_data_uri(source):
        return None
    if named_page(source, access) is not None:
        return None
    with _opened(source, access) as file:
        data = file.read(_HEADER_BYTES)
        if len(data) == _HEADER_BYTES and not data.startswith(b"RIFF"):  # WebP's decoder takes the whole file
            with suppress(Exception):  # the header may be longer
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


def _opened(source: Any, access: ImageAccess) -> AbstractContextManager[BinaryIO]:
    if isinstance(source, bytes | Mapping):
        return io.BytesIO(_bytes_of(source))
    return _opened_file(_find(source, access)[0], access)


@contextmanager
def _opened_file(target: str, access: ImageAccess) -> Iterator[BinaryIO]:
    """A file that was found.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with os.fdopen(open_resolved(target, _root(access)), "rb") as file:
            yield file
    except OSError as error:
        raise UserError(
            f"{_shown(target)} cannot be read ({error.strerror or error}); check its permissions"
        ) from error


def _find(path: str, access: ImageAccess) -> tuple[str, int | None, os.stat_result]:
    """The regular file that a path leads to after links are followed, the page it names or None, and its entry.

    Raises:
        UserError: there is none, or it may not be reached.
    """
    shown = _shown(path)
    if "://" in path:
        meant = hint(path, access.root or "") if "file:" in path.lower() else ""
        raise UserError(f"{shown} is a kind of URL that is not read; give a path, an http(s) URL or a data URI{meant}")
    if path.startswith(("//", "\\\\")):
        raise UserError(f"{shown} is a network path; mount the share and give a path on this machine")
    root = _root(access) or str(Path.cwd())
    page = None
    try:
        if "#" in path:
            path, page = find_page(path, root)
        target, info = _real_file(os.path.join(root, path))  # noqa: PTH118
    except UnusableImage as error:
        raise UserError(f"{shown}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"there is no file {shown if page is None else _shown(path)}{hint(path, root)}") from None
    except OSError as error:
        raise UserError(f"{shown} cannot be reached ({error.strerror})") from error
    except ValueError:  # half a surrogate pair, or a null character
        raise UserError(f"{shown} has characters that no path can have") from None
    if access.root is not None and not _is_inside(target, root):
        raise UserError(f"{shown} lies outside {root}; move it inside, or set data.images_root to a wider folder")
    if not stat.S_ISREG(info.st_mode):
        raise UserError(f"{shown} is not a regular file")
    if info.st_size == 0:
        raise UserError(f"{shown} is empty")
    if info.st_size > access.max_bytes:
        raise UserError(f"{shown} has {info.st_size:,} bytes, more than the {access.max_bytes:,} allowed")
    return target, page, info


def _real_file(path: str) -> tuple[str, os.stat_result]:
    """A file after links are followed, and its entry. Rows name many files of one folder: where that leads to is
    remembered.

    Raises:
        OSError: it is not there.
    """
    folder, name = os.path.split(path)
    if name not in ("", ".", ".."):
        target = os.path.join(_real_folder(folder), name)  # noqa: PTH118
        info = os.lstat(target)
        if not stat.S_ISLNK(info.st_mode):
            return target, info
    target = os.path.realpath(path, strict=True)
    return target, os.lstat(target)


def _root(access: ImageAccess) -> str | None:
    """The folder that files must be in, links followed; None for any."""
    return None if access.root is None else _real_folder(str(access.root.absolute()))


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    """Where a folder leads to. It may have become a link since: then its files are not opened (`open_resolved`)."""
    return os.path.realpath(folder)


def _is_inside(target: str, root: str) -> bool:
    return target.startswith(root if root.endswith(os.sep) else root + os.sep)


def _shown(path: str) -> str:
    text = repr(path)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"
