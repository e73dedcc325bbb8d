"""Images of requests: data URIs and, where they are allowed, http(s) URLs; never a file of this machine.

A request is written by somebody else, so its images are bounded in number, bytes and pixels, and URLs lead to public
addresses only (`qwenvl.images.image_urls`). An image is handed on as its bytes: the same bytes are the same image,
whatever they are called, and what a URL leads to may change.
"""

from collections.abc import Mapping
from typing import Any

from finetune.serve.request_error import RequestError
from qwenvl import ImageAccess, load_image
from qwenvl.images.image_decoding import check_kind
from qwenvl.images.image_urls import UrlError, display_url, is_data_uri, is_url
from qwenvl.images.images import ImageError, data_uri_bytes, url_bytes
from qwenvl.images.page_references import split_page
from qwenvl.images.unusable_image import UnusableImage

DATA_URI = "data:image/png;base64,..."

ImageSource = bytes | Mapping[str, Any]
"""Encoded bytes, or these and a page: `{"bytes": ..., "page": 3}`; as `load_image` takes them."""


def read_image(url: object, place: str, access: ImageAccess) -> ImageSource:
    """The encoded image of an `image_url`. Fetches a URL, and decodes nothing.

    Args:
        url: a data URI, or an http(s) URL. `#3` at its end is the third page of a PDF or TIFF.
        place: of the image in the request.
        access: whether URLs are fetched, and the limits; its `root` has no meaning here.

    Raises:
        RequestError: not such a URL, a URL where they are not allowed, one that cannot be fetched, too many bytes, or
            what is plainly no image.
    """
    if not isinstance(url, str):
        raise RequestError(place, f"the url of an image must be a text such as {DATA_URI}, not {type(url).__name__}")
    if not is_data_uri(url) and not is_url(url):
        shown = display_url(url) if len(url) <= 80 else f"{display_url(url)[:80]}..."
        others = " and http(s) URLs" if access.allow_urls else ""
        raise RequestError(place, f"images are read from data URIs ({DATA_URI}){others}, and never from {shown!r}")
    reference, page = split_page(url)
    if page == 0:
        raise RequestError(place, "page 0 is asked for, and pages are counted from 1: write #1 for the first one")
    if is_url(url) and not access.allow_urls:
        raise RequestError(place, f"this server fetches no URLs: send the image itself, as {DATA_URI}")
    try:
        data = data_uri_bytes(reference, access) if is_data_uri(url) else url_bytes(reference, access)
        check_kind(data)
    except UnusableImage as error:
        raise RequestError(place, f"the image cannot be used: {error.reason}") from error
    except UrlError as error:
        raise RequestError(place, f"the image cannot be fetched: {error.url}: {error.reason}") from error
    return data if page is None else {"bytes": data, "page": page}


def image_size(source: ImageSource, place: str, access: ImageAccess) -> tuple[int, int]:
    """Width and height of the upright image in pixels. Decodes it.

    Raises:
        RequestError: it cannot be decoded, or is beyond the limits.
    """
    try:
        return load_image(source, access=access).size
    except ImageError as error:
        raise RequestError(place, f"the image cannot be used: {error.reason}") from error
