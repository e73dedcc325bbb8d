"""Requests for images: what to read, a key without decoding, and reading."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from qwenvl import ImageAccess, QwenVLImageProcessor
from qwenvl.images.images import ImageReader
from qwenvl.images.pdf_pages import DPI
from qwenvl.views import PagePart


class ImageRequest(NamedTuple):
    """An image to be read: its `source`, what it may reach, and what to call it in errors."""

    source: Any
    access: ImageAccess
    name: str


class VisionCache(Protocol):
    """Has the features of encoded images; `finetune.vision_cache.cache` has the one that is used in training."""

    def get(self, request: ImageRequest, reader: ImageReader | None = None) -> torch.Tensor:
        """(n_queries, hidden) features of an image, or (3, S, S) uint8 pixels where it was not encoded.

        Args:
            reader: as for `read_pixels`.

        Raises:
            UserError: the image or its features have changed since the run began.
            ImageError: an image that was not encoded cannot be read.
        """
        ...


def image_key(source: Any, access: ImageAccess) -> str:
    """A key of an image without decoding it: by content for one in memory, else by its path or URL; and by its page
    and, where that is not the usual one, the resolution that pages are drawn in. A part of an image has a key
    of its own."""
    if isinstance(source, PagePart):
        return f"{image_key(source.source, access)} {source.place}"
    if access.dpi != DPI:
        return f"{image_key(source, replace(access, dpi=DPI))} {access.dpi} dpi"
    if isinstance(source, Mapping):
        if source.get("page") is not None:
            return f"{image_key({**source, 'page': None}, access)}#{source['page']}"
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if isinstance(source, str | os.PathLike):
        return f"{access.root}:{os.fspath(source)}"
    if not isinstance(source, bytes):
        pixels = np.asarray(source)
        source = str(pixels.shape).encode() + pixels.tobytes()
    return hashlib.sha256(source).hexdigest()


def read_pixels(
    request: ImageRequest, image_processor: QwenVLImageProcessor, reader: ImageReader | None = None
) -> torch.Tensor:
    """An image as the model takes it, (3, S, S) uint8.

    Args:
        reader: of the images before it, so that pictures of one image are cut from it, decoded once; None for one
            image alone.

    Raises:
        ImageError: it cannot be read.
    """
    image = (reader or ImageReader()).load(request.source, access=request.access, name=request.name)
    return image_processor(image, do_normalize=False, return_tensors="pt")["pixel_values"][0]
