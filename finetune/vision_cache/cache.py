"""Look up the features of a run's images, which were encoded once before training.

Features are stored by what was encoded: the pixels after decoding and resizing (`content_key`), in a folder for each
vision tower (`tower_fingerprint`). An image is found without decoding it by its handle (`ImageHandles`): its path and
time of change, or its encoded bytes, together with the preprocessing that makes pixels of it. An image with an unknown
handle is decoded, and found by its pixels.
"""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import PIL
import torch
from huggingface_hub import constants

from finetune.batches.image_request import ImageRequest, image_key, read_pixels
from finetune.errors import UserError
from finetune.terminal import terminal_line
from finetune.vision_cache.store import KEY_BYTES, Damaged, FeatureStore
from qwenvl import ImageAccess, QwenVLImageProcessor
from qwenvl.images.image_urls import is_data_uri, is_url
from qwenvl.images.images import ImageReader
from qwenvl.images.page_references import split_page
from qwenvl.images.pdf_pages import SIGNATURE
from qwenvl.views import whole_of

logger = logging.getLogger(__name__)

COARSEST_TIME = 2.0
"""Seconds: the coarsest resolution of a file's time of change on a usual file system (FAT)."""


def cache_folder() -> Path:
    """Where the features of all towers are stored: in the Hugging Face home (`HF_HOME`), which is on the disk that has
    room for large files that can be made again."""
    return Path(constants.HF_HOME) / "qwenvl-vision-cache"


def content_key(pixels: torch.Tensor) -> bytes:
    """The key of an image's pixels, (3, S, S) uint8, as the tower takes them."""
    digest = blake2b(str(tuple(pixels.shape)).encode(), digest_size=KEY_BYTES)
    digest.update(pixels.contiguous().numpy().data.cast("B"))
    return digest.digest()


@dataclass(frozen=True)
class ImageHandles:
    """Tells images apart without decoding them.

    A file is known by its path, size, mtime and ctime (to the nanosecond); an image in a row by its encoded bytes; a
    URL by itself, in one run only.

    Attributes:
        preprocessing: what decides an image's pixels besides its bytes; see `preprocessing_of`.
        run: a random name of the run, the same in all its processes.
    """

    preprocessing: str
    run: str

    def of(self, source: Any, access: ImageAccess) -> bytes:
        """The handle of an image."""
        known_by = [self.preprocessing, image_key(source, access)]
        if _is_pdf(source):
            known_by.append(f"pdfium {version('pypdfium2')}")
        if (place := place_of(source)) is not None:
            known_by.append(self.run if is_url(place) else _stamp(place, access))
        return blake2b("\n".join(known_by).encode(errors="surrogatepass"), digest_size=KEY_BYTES).digest()


def _is_pdf(source: Any) -> bool:
    source = whole_of(source)
    if isinstance(source, Mapping):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if isinstance(source, bytes):
        return SIGNATURE.match(source) is not None
    if not isinstance(source, str | os.PathLike):
        return False
    return split_page(os.fspath(source))[0].lower().endswith(".pdf")


def settle(source: Any, access: ImageAccess) -> None:
    """Wait until a file's last change is old enough for a later change to give it another time.

    Some file systems count times in whole seconds: two changes within one would look like one.
    """
    place = place_of(source)
    if place is None or is_url(place) or (info := _look_at(place, access)) is None:
        return
    left = COARSEST_TIME - (time.time() - info.st_mtime)
    if 0 < left <= COARSEST_TIME:
        time.sleep(left)


def place_of(source: Any) -> str | None:
    """Path or URL of an image; None for image data."""
    source = whole_of(source)
    if isinstance(source, Mapping):
        source = source["path"] if source.get("bytes") is None else None
    if not isinstance(source, str | os.PathLike) or is_data_uri(source):
        return None
    return os.fspath(source)


def _look_at(path: str, access: ImageAccess) -> os.stat_result | None:
    for file in dict.fromkeys((path, split_page(path)[0])):
        try:
            return Path(access.root or "", file).stat()
        except (OSError, ValueError):  # reported when it is opened
            continue
    return None


def _stamp(path: str, access: ImageAccess) -> str:
    info = _look_at(path, access)
    return "" if info is None else f"{info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}"


def preprocessing_of(image_processor: QwenVLImageProcessor) -> str:
    """What decides the pixels of an image besides its bytes: size, resampling, and the library that does it."""
    settings = image_processor.to_dict()
    # 2: resized by `images.resizing`; 1 was by Pillow itself. Pillow's decoders differ from version to version.
    return f"{settings['size']} {settings['resample']} Pillow {PIL.__version__} 2"


@dataclass(frozen=True)
class VisionCache:
    """Looks up features. Pickles to loader workers.

    Attributes:
        store: the features.
        handles: how images are told apart.
        image_processor: of the model; decodes images that are not found.
        complete: all images of the run are in the store, and the tower may have been removed.
    """

    store: FeatureStore
    handles: ImageHandles
    image_processor: QwenVLImageProcessor
    complete: bool

    def get(self, request: ImageRequest, reader: ImageReader | None = None) -> torch.Tensor:
        """The features of an image, or its pixels if it was left out for the cache's bound.

        Args:
            reader: see `read_pixels`.

        Returns:
            (n_queries, hidden) features, or (3, S, S) uint8 pixels.

        Raises:
            UserError: the image or its features are not what they were when the run began.
            ImageError: an image that was not encoded cannot be read.
        """
        content = self.store.handles.get(self.handles.of(request.source, request.access))
        pixels = None
        if content not in self.store.places:
            # The file was touched, or the image was left out for the bound.
            pixels = read_pixels(request, self.image_processor, reader)
            content = content_key(pixels)
        damage = "it is not what it was when its features were computed"
        if content in self.store.places:
            try:
                return self.store.read(content)
            except Damaged as error:
                damage = f"its features are damaged ({error})"
        if self.complete:
            raise UserError(
                f"{request.name}: {damage}. Start the run again: it resumes from its last checkpoint, and this image "
                "is encoded again"
            )
        if damage.startswith("its"):
            logger.warning("%s: %s: encoded again", terminal_line(request.name), terminal_line(damage))
        return read_pixels(request, self.image_processor, reader) if pixels is None else pixels
