"""Any image source -> a safe RGB PIL image: `load_image`.

    load_image("photos/cat.jpg")                                    # a path, relative to the working directory
    load_image("cat.jpg", access=ImageAccess(root=Path("photos")))  # nothing outside photos/, links followed
    load_image("https://...", access=ImageAccess(allow_urls=True))  # only when allowed, and public addresses only
    load_image("scan.pdf#3"), load_image("scan.tif", page=2)        # one page, from 1, of a file that has several
    load_image(b"\\x89PNG..."), load_image("data:image/png;base64,..."), load_image(pil), load_image(array)

Datasets are written by others, so a source is untrusted: it reaches only what `ImageAccess` allows, is limited in
bytes and pixels, and is decoded by a fixed list of decoders that run in this process (PDFs in one of their own, with
bounds in time and memory). The result is a complete image,
or an `ImageError` that says which image, why, and what to do.
"""

import binascii
import os
import re
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwenvl.errors import InputError
from qwenvl.images.image_decoding import decode, rgb_from_image
from qwenvl.images.image_urls import IPAddress, UrlError, display_url, fetch, is_data_uri, is_public_address, is_url
from qwenvl.images.page_references import check_page, find_page, split_page
from qwenvl.images.pdf_pages import DPI
from qwenvl.images.pixel_limits import check_pixels
from qwenvl.images.unusable_image import UnusableImage
from qwenvl.views import PagePart, whole_of

# Not every platform has every flag; a missing one guards against something that does not exist on that platform.
_OPEN_FILE = sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"))
_OPEN_FOLDER = sum(getattr(os, flag, 0) for flag in ("O_PATH", "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC"))


class ImageError(InputError):
    """An image cannot be loaded. The message names the image, the reason and the remedy.

    Attributes: `image`, `reason`, `remedy`.
    """

    def __init__(self, image: str, reason: str, remedy: str):
        super().__init__(image, reason, remedy)
        self.image, self.reason, self.remedy = image, reason, remedy

    def __str__(self) -> str:
        return f"{self.image}: {self.reason}; {self.remedy}"


@dataclass(frozen=True)
class ImageAccess:
    """What image references may reach, and the limits on what is read."""

    root: Path | None = None
    """Folder that every path must be in after symbolic links are resolved; relative paths start there. None: any path;
    relative ones start at the working directory."""
    allow_urls: bool = False
    """Whether http and https URLs are fetched."""
    max_bytes: int = 300_000_000
    """Bytes of an encoded image; the default is 100 million pixels of raw 8-bit RGB."""
    max_pixels: int = 100_000_000
    """Pixels (width x height); the default admits a 90-megapixel scan. Decoding takes about 8 bytes per pixel."""
    dpi: int = DPI
    """Pixels an inch of a PDF's page."""
    url_timeout: float = 20.0
    """Seconds for one URL, redirects included."""
    max_redirects: int = 3
    """Redirects followed for one URL."""
    address_allowed: Callable[[IPAddress], bool] = is_public_address
    """Which addresses a URL may lead to."""

    def __post_init__(self) -> None:
        if self.root is not None:
            object.__setattr__(self, "root", Path(self.root))
        for field in ("max_bytes", "max_pixels", "url_timeout", "dpi"):
            if not getattr(self, field) > 0:
                raise InputError(f"ImageAccess: {field} must be above 0, not {getattr(self, field)!r}")
        if self.max_redirects < 0:
            raise InputError(f"ImageAccess: max_redirects must be 0 or more, not {self.max_redirects!r}")


def load_image(
    source: Any, *, access: ImageAccess = ImageAccess(), name: str | None = None, page: int | None = None
) -> Image.Image:
    """Load an image in mode RGB, upright, on white.

    EXIF orientation is applied, transparency composited on white, deep pixels scaled (`image_color`), colour
    profiles ignored. An opaque, unrotated 8-bit image is exactly what PIL's `convert("RGB")` gives. A page of a PDF is
    drawn at `access.dpi`. A file of several pages or frames (PDF, TIFF, animated GIF, WebP, PNG or AVIF) is an error
    unless one of them is named.

    Args:
        source: one of
            - str or Path: a path; a str may also be a `data:image/...;base64,` URI or an http(s) URL. Path or URL may
              end in `#3` for the third page; a file whose own name ends so is that file;
            - bytes, bytearray, memoryview: an encoded image or a PDF;
            - PIL.Image.Image, which is not changed; of several frames, the one that it is at;
            - numpy uint8 (height, width), (height, width, 1 | 3 | 4);
            - torch uint8 (height, width), (channels, height, width) or (height, width, channels), if the shape is
              not ambiguous;
            - {"bytes": ..., "path": ...}: the datasets library's undecoded image; the path is opened if there are no
              bytes. "page": the page to read;
            - `qwenvl.views.PagePart`: a part of any of these, cut from the upright image.
        access: what paths and URLs may reach, and the limits.
        name: the image's name in errors (a file and row, for example), in addition to its description.
        page: the page or frame to read, from 1; None for the one that the source names, or the only one.

    Raises:
        ImageError: the source is not allowed, not found, not an image, damaged, encrypted, or beyond a limit; or it
            has several pages and none is named, or not the one that is.
    """
    if isinstance(source, PagePart):
        return _cut(load_image(source.source, access=access, name=name, page=page), source)
    described = _describe(source)
    label = f"{name} ({described})" if name else described
    try:
        return _load(source, access, None if page is None else check_page(page))
    except (UnusableImage, UrlError) as error:
        raise ImageError(label, error.reason, error.remedy) from error.__cause__


class ImageReader:
    """Loads images one after the other; pictures of one image that follow one another are cut from it, decoded once.

    Keeps the last image, so it is for one task and one thread.
    """

    def __init__(self) -> None:
        self._last: tuple[Any, ImageAccess] | None = None
        self._image: Image.Image | None = None

    def load(self, source: Any, *, access: ImageAccess = ImageAccess(), name: str | None = None) -> Image.Image:
        """As `load_image`; errors are the same."""
        whole = whole_of(source)
        if self._image is None or self._last is None or whole is not self._last[0] or access != self._last[1]:
            self._image = None  # the memory is free before another image takes its own
            self._image, self._last = load_image(whole, access=access, name=name), (whole, access)
        return _cut(self._image, source) if isinstance(source, PagePart) else self._image


def _cut(image: Image.Image, part: PagePart) -> Image.Image:
    return image.crop(part.box(*image.size))


def _describe(source: Any) -> str:
    """The source's name in a message: short, printable, without credentials."""
    match source:
        case Image.Image():
            text = f"PIL image, {source.mode}, {source.width} x {source.height}"
            filename = getattr(source, "filename", "")
            return f"{text}, from {filename!r}"[:200] if filename else text
        case bytes() | bytearray() | memoryview():
            return f"{memoryview(source).nbytes} bytes"
        case str() if is_data_uri(source):
            return f"data URI of {len(source)} bytes"
        case str() | os.PathLike():
            text = display_url(os.fsdecode(source) if isinstance(source, os.PathLike) else source)
            return repr(text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}")
        case {"path": str() | os.PathLike() as path}:
            return _describe(path)
        case Mapping():
            return f"mapping with keys {sorted(map(str, source))}"[:200]
    shape = getattr(source, "shape", None)
    return type(source).__name__ if shape is None else f"{type(source).__name__} of shape {tuple(shape)}"


def _load(source: Any, access: ImageAccess, page: int | None) -> Image.Image:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), access, page)
    if is_data_uri(source):
        return _decode(data_uri_bytes(source, access), access, page)
    if is_url(source):
        url, named = split_page(source)
        return _decode(url_bytes(url, access), access, _one_page(named, page))
    if isinstance(source, (str, os.PathLike)):
        data, named = _file_bytes(os.fsdecode(source), access)
        return _decode(data, access, _one_page(named, page))
    if isinstance(source, Mapping):
        if not set(source) <= {"bytes", "path", "page"}:
            raise UnusableImage("it is a mapping with other keys than 'bytes' and 'path'", "pass the image itself")
        inner = source.get("path") if source.get("bytes") is None else source["bytes"]
        allowed = (str, os.PathLike) if source.get("bytes") is None else (bytes, bytearray, memoryview)
        if not isinstance(inner, allowed):
            raise UnusableImage("its 'bytes' and 'path' hold no image", "give encoded bytes or a path")
        named = None if source.get("page") is None else check_page(source["page"])
        return _load(inner, access, _one_page(named, page))
    if page is not None:
        raise UnusableImage("it is pixels, which have no pages", "leave the page out")
    if isinstance(source, Image.Image):
        return rgb_from_image(source, access.max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, access)
    # Whoever passes a tensor has imported torch, so that this module need not.
    if "torch" in sys.modules and isinstance(source, sys.modules["torch"].Tensor):
        return _from_tensor(source, access)
    raise UnusableImage(
        f"a {type(source).__name__} is not an image source",
        "pass a path, encoded bytes, a data URI, a PIL image, or a uint8 array",
    )


def _one_page(named: int | None, page: int | None) -> int | None:
    """The page that a source names or that was asked for beside it."""
    if named is not None and page is not None and named != page:
        raise UnusableImage(f"it names page {named}, and page {page} is asked for", "name the page once")
    return page if named is None else named


def _decode(data: bytes, access: ImageAccess, page: int | None) -> Image.Image:
    _check_bytes(len(data), access)
    return decode(data, access.max_pixels, page=page, dpi=access.dpi)


# --- references -> bytes ---------------------------------------------------------------------------------------------


def data_uri_bytes(uri: str, access: ImageAccess) -> bytes:
    """The encoded image in a data URI.

    Raises:
        UnusableImage: no base64 image, or one that is longer than allowed.
    """
    header, comma, payload = uri.partition(",")
    if not comma or not re.fullmatch(
        r"data:(?:image/[\w.+-]+|application/pdf)(;[\w-]+=[\w.-]+)*;base64", header, re.IGNORECASE
    ):
        raise UnusableImage("it is no base64 image", "write it as data:image/png;base64,...")
    _check_bytes(len(payload) * 3 // 4, access)
    try:
        # strict_mode accepts missing padding at the end.
        if len(payload) % 4:
            raise binascii.Error("its length is no multiple of 4")
        return binascii.a2b_base64(payload, strict_mode=True)
    except ValueError as error:
        raise UnusableImage(f"its base64 is malformed ({error})", "encode it again, without line breaks") from error


def url_bytes(url: str, access: ImageAccess) -> bytes:
    """The encoded image at an http(s) URL.

    Raises:
        UnusableImage: URLs are not allowed.
        UrlError: it cannot be fetched.
    """
    if not access.allow_urls:
        raise UnusableImage(
            "URLs are not fetched here", "download the image and give its path, or allow URLs (allow_urls)"
        )
    return fetch(
        url,
        max_bytes=access.max_bytes,
        timeout=access.url_timeout,
        max_redirects=access.max_redirects,
        address_allowed=access.address_allowed,
    )


def _file_bytes(path: str, access: ImageAccess) -> tuple[bytes, int | None]:
    descriptor, page = _open_path(path, access)
    try:
        with os.fdopen(descriptor, "rb") as file:
            return file.read(access.max_bytes + 1), page
    except OSError as error:
        raise UnusableImage(f"it cannot be read ({error.strerror})", "check the path and its disk") from error


def _open_path(path: str, access: ImageAccess) -> tuple[int, int | None]:
    # Path("ftp://host") has only one slash left.
    if "://" in path or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path):
        raise UnusableImage("this kind of URL is not read", "give a path, an http(s) URL or a data URI")
    if path.startswith(("//", "\\\\")):
        raise UnusableImage("network paths are not read", "mount the share and give a path on this machine")
    if not path:
        raise UnusableImage("the path is empty", "give the image's path")
    try:
        root = os.path.realpath(access.root or "", strict=True)
    except OSError as error:
        raise UnusableImage(
            f"the image root {access.root} cannot be reached ({error.strerror})", "correct the root"
        ) from error
    try:
        path, page = find_page(path, root)
        target = os.path.realpath(Path(root, path), strict=True)
        if access.root is not None and not Path(target).is_relative_to(root):
            raise UnusableImage(
                f"it lies outside the image root {access.root}", "move it inside, or choose a wider root"
            )
        # Checked before it is opened, as opening some devices has side effects, and again after, as it may change.
        _check_regular(Path(target).lstat(), access)
        descriptor = open_resolved(target, None if access.root is None else root)
        try:
            _check_regular(os.fstat(descriptor), access)
        except BaseException:
            os.close(descriptor)
            raise
    except UnusableImage:
        raise
    except FileNotFoundError:
        raise UnusableImage("there is no such file", f"check the path; relative paths start at {root}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL, or characters the file system cannot hold
        reason = getattr(error, "strerror", None) or str(error)
        raise UnusableImage(f"it cannot be opened ({reason})", "check the path and its permissions") from error
    return descriptor, page


def open_resolved(target: str, root: str | None) -> int:
    """Open a file that was found, for reading: folder by folder without following links, so that a folder or file
    that was replaced by a link since is an error.

    Args:
        target: its path, links followed.
        root: the folder that it must be in, links followed; None where it may be anywhere.

    Returns:
        The file's descriptor.

    Raises:
        OSError: it is not there any more, or a link.
    """
    if root is None or os.open not in os.supports_dir_fd:
        return os.open(target, _OPEN_FILE)
    *folders, file = Path(target).relative_to(root).parts
    here = os.open(root, _OPEN_FOLDER)
    try:
        for folder in folders:
            outer, here = here, os.open(folder, _OPEN_FOLDER, dir_fd=here)
            os.close(outer)
        return os.open(file, _OPEN_FILE, dir_fd=here)
    finally:
        os.close(here)


def _check_regular(info: os.stat_result, access: ImageAccess) -> None:
    if stat.S_ISDIR(info.st_mode):
        raise UnusableImage("it is a folder", "give the path of an image file")
    if not stat.S_ISREG(info.st_mode):
        raise UnusableImage("it is a device, pipe or socket", "give the path of a regular file")
    # Files that the kernel generates on reading (/proc) have size 0 too, and some of them never end.
    if info.st_size == 0:
        raise UnusableImage("the file is empty", "replace it, or drop it from the data")
    _check_bytes(info.st_size, access)


def _check_bytes(count: int, access: ImageAccess) -> None:
    if count > access.max_bytes:
        raise UnusableImage(f"it is longer than the {access.max_bytes} bytes allowed", "shrink it, or raise max_bytes")


# --- arrays -> images ------------------------------------------------------------------------------------------------


def _from_array(array: np.ndarray, access: ImageAccess) -> Image.Image:
    """(height, width) or (height, width, 1 | 3 | 4), uint8."""
    if array.dtype != np.uint8:
        raise UnusableImage(
            f"its pixels are {array.dtype}, whose range is not known", "scale them to 0..255 and cast to uint8"
        )
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise UnusableImage("its shape is not (height, width) or (height, width, 1 | 3 | 4)", "transpose it")
    check_pixels((array.shape[1], array.shape[0]), access.max_pixels)
    return rgb_from_image(Image.fromarray(np.ascontiguousarray(array)), access.max_pixels)


def _from_tensor(tensor: Any, access: ImageAccess) -> Image.Image:
    """(height, width), or channels first or last if the shape is not ambiguous, uint8."""
    if tensor.is_floating_point():  # before conversion to numpy, which has no bfloat16
        raise UnusableImage(
            f"its pixels are {tensor.dtype}, whose range is not known", "scale them to 0..255 and cast to uint8"
        )
    if tensor.ndim == 3:
        first, last = tensor.shape[0] in (1, 3, 4), tensor.shape[-1] in (1, 3, 4)
        if first and last:
            raise UnusableImage("its shape fits channels first and channels last", "pass a numpy array, channels last")
        if first:
            tensor = tensor.permute(1, 2, 0)
    return _from_array(tensor.detach().cpu().numpy(), access)
