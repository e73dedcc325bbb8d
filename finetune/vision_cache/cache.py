"""The features of a run's images, encoded once before training and looked up from then on.

Features are kept by what was encoded: the pixels after decoding and resizing (`content_key`), in a folder of their
tower (`tower_fingerprint`). So that an image need not be decoded to be found, the store also knows it by its handle
(`ImageHandles`): where it lies and when it was changed, or its encoded bytes, and what turns these into pixels. A
handle that is not known costs one decoding, and the features are found by the pixels all the same.
"""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import PIL
import torch
from huggingface_hub import constants

from finetune.batches.image_request import ImageRequest, image_key, read_pixels
from finetune.errors import UserError
from finetune.vision_cache.store import KEY_BYTES, Damaged, FeatureStore
from qwenvl import ImageAccess, QwenVLImageProcessor

logger = logging.getLogger(__name__)

COARSEST_TIME = 2.0
"""Seconds between two times that a file system can tell apart: FAT's."""


def cache_folder() -> Path:
    """Where the features of all towers are kept: in the Hugging Face home (`HF_HOME`), the place that already holds
    what is large and can be had again, on the disk that has room for it."""
    return Path(constants.HF_HOME) / "qwenvl-vision-cache"


def content_key(pixels: torch.Tensor) -> bytes:
    """Of an image as the tower gets it, (3, S, S) uint8."""
    digest = blake2b(str(tuple(pixels.shape)).encode(), digest_size=KEY_BYTES)
    digest.update(memoryview(pixels.contiguous().numpy()).cast("B"))
    return digest.digest()


@dataclass(frozen=True)
class ImageHandles:
    """Tells images apart without decoding them.

    A file is known by its path, size, and the times of its last change (of content and of anything, to the
    nanosecond); an image in a row by its encoded bytes; a URL by itself, and in one run only.

    Attributes:
        preprocessing: what makes pixels of an image, see `preprocessing_of`.
        run: differs between runs, and is the same in all processes of one.
    """

    preprocessing: str
    run: str

    def of(self, source: Any, access: ImageAccess) -> bytes:
        """The handle of an image."""
        known_by = [self.preprocessing, image_key(source, access)]
        if (place := place_of(source)) is not None:
            known_by.append(self.run if _is_url(place) else _stamp(place, access))
        return blake2b("\n".join(known_by).encode(errors="surrogatepass"), digest_size=KEY_BYTES).digest()


def settle(source: Any, access: ImageAccess):
    """Wait until a file was last changed so long ago that a change from now on gives it another time. As some file
    systems count times in seconds, one that was changed twice within one would else look the same."""
    place = place_of(source)
    if place is None or _is_url(place) or (info := _look_at(place, access)) is None:
        return
    left = COARSEST_TIME - (time.time() - info.st_mtime)
    if 0 < left <= COARSEST_TIME:
        time.sleep(left)


def place_of(source: Any) -> str | None:
    """Path or URL of an image; None of one that is at hand itself."""
    if isinstance(source, Mapping):
        source = source["path"] if source.get("bytes") is None else None
    if not isinstance(source, str | os.PathLike) or os.fspath(source)[:5].lower() == "data:":
        return None
    return os.fspath(source)


def _is_url(place: str) -> bool:
    return place.lower().startswith(("http:", "https:"))


def _look_at(path: str, access: ImageAccess) -> os.stat_result | None:
    try:
        return Path(access.root or "", path).stat()
    except (OSError, ValueError):  # who opens it will say what is wrong
        return None


def _stamp(path: str, access: ImageAccess) -> str:
    info = _look_at(path, access)
    return "" if info is None else f"{info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}"


def preprocessing_of(image_processor: QwenVLImageProcessor) -> str:
    """What decides the pixels of an image besides its bytes: size, resampling, and the library that does it."""
    settings = image_processor.to_dict()
    return f"{settings['size']} {settings['resample']} Pillow {PIL.__version__} 1"


@dataclass(frozen=True)
class VisionCache:
    """Looks up what was encoded. Pickles to loader workers.

    Attributes:
        store: the features.
        handles: how images are told apart.
        image_processor: of the model; decodes what is not found.
        complete: all images of the run are there, and the tower may be gone.
    """

    store: FeatureStore
    handles: ImageHandles
    image_processor: QwenVLImageProcessor
    complete: bool

    def get(self, request: ImageRequest) -> torch.Tensor:
        """The features of an image, or what they can be computed from.

        Returns:
            (n_queries, hidden) features; or, of an image that was not encoded because a bound was reached, its
            (3, S, S) uint8 pixels.

        Raises:
            UserError: the image or its features are not what they were when the run began.
            ImageError: an image that was not encoded cannot be read.
        """
        content = self.store.handles.get(self.handles.of(request.source, request.access))
        pixels = None
        if content not in self.store.places:
            # Touched since, or left out for the bound.
            pixels = read_pixels(request, self.image_processor)
            content = content_key(pixels)
        damage = "it is not what it was when its features were computed"
        if content in self.store.places:
            try:
                return self.store.read(content)
            except Damaged as error:
                damage = f"its features are damaged ({error})"
        if self.complete:
            raise UserError(
                f"{request.name}: {damage}. Start the run again: it goes on from its last checkpoint, and this image "
                "is encoded anew"
            )
        if damage.startswith("its"):
            logger.warning("%s: %s: encoded anew", request.name, damage)
        return read_pixels(request, self.image_processor) if pixels is None else pixels
