"""The image features of many questions: threads read images ahead, and each image is encoded once."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby

import torch

from finetune.batches.budget import ENCODED_TOGETHER, KEPT_FEATURE_BYTES
from finetune.batches.image_request import ImageRequest, VisionCache, read_pixels
from qwenvl import QwenVLForConditionalGeneration, QwenVLImageProcessor
from qwenvl.images.images import ImageError, ImageReader
from qwenvl.views import whole_of

READERS = 4  # threads that decode; Pillow releases the GIL while it decodes and resizes


class ImageStore:
    """Features by key, at most `keep_bytes` of them: the least recently used are dropped.

    Use it as a context manager, which ends the reader threads.

    Args:
        model: encodes on its device, in its current mode.
        image_processor: of the model.
        keep_bytes: bytes of features to keep. The images of one call of `features` are kept even if they are more.
        cache: has features of images that were encoded before; None without one.
        encode: (images, 3, S, S) -> (images, n_queries, hidden); None is the model's `get_image_features`.
    """

    def __init__(
        self,
        model: QwenVLForConditionalGeneration,
        image_processor: QwenVLImageProcessor,
        keep_bytes: int = KEPT_FEATURE_BYTES,
        cache: VisionCache | None = None,
        encode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self._encode_pixels = model.get_image_features if encode is None else encode
        self._model, self._image_processor, self._keep_bytes = model, image_processor, keep_bytes
        self._cache = cache
        self._readers = ThreadPoolExecutor(READERS, "read-images")
        # Being read, or read and not encoded yet: the pictures of one image together, by key.
        self._pending: dict[str, Future[dict[str, torch.Tensor]]] = {}
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._unreadable: dict[str, ImageError] = {}
        self._bytes = 0
        self.encoded = 0

    def __enter__(self) -> "ImageStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._readers.shutdown(wait=True, cancel_futures=True)

    def read_ahead(self, requests: Mapping[str, ImageRequest]) -> None:
        """Start to read images, by key, except those that are here or being read already."""
        missing = [
            (key, request)
            for key, request in requests.items()
            if key not in self._pending and key not in self._features and key not in self._unreadable
        ]
        # Neighbours that are pictures of one image are read together, so that it is decoded once.
        for _, pictures in groupby(missing, lambda item: (id(whole_of(item[1].source)), item[1].access)):
            group = dict(pictures)
            self._pending |= dict.fromkeys(group, self._readers.submit(self._read, group))

    def features(self, requests: Mapping[str, ImageRequest]) -> dict[str, torch.Tensor | ImageError]:
        """The features of images, by key.

        Returns:
            key -> (n_queries, hidden) on the model's device, or the error if the image cannot be read.
        """
        self.read_ahead(requests)
        wanted = list(requests)
        missing = [key for key in wanted if key in self._pending]
        for start in range(0, len(missing), ENCODED_TOGETHER):
            self._encode(missing[start : start + ENCODED_TOGETHER])
        found: dict[str, torch.Tensor | ImageError] = {}
        for key in wanted:
            if key in self._unreadable:
                found[key] = self._unreadable[key]
            else:
                self._features.move_to_end(key)
                found[key] = self._features[key]
        while self._bytes > self._keep_bytes and len(self._features) > len(wanted):
            _, dropped = self._features.popitem(last=False)
            self._bytes -= dropped.nbytes
        return found

    def _read(self, requests: Mapping[str, ImageRequest]) -> dict[str, torch.Tensor]:
        """By key (3, S, S) uint8, or (n_queries, hidden) of an image that is in the cache."""
        reader = ImageReader()
        if self._cache is not None:
            return {key: self._cache.get(request, reader) for key, request in requests.items()}
        return {key: read_pixels(request, self._image_processor, reader) for key, request in requests.items()}

    @torch.no_grad()
    def _encode(self, keys: Sequence[str]) -> None:
        read: dict[str, torch.Tensor] = {}
        for key in keys:
            try:
                read[key] = self._pending[key].result()[key]
            except ImageError as error:
                self._unreadable[key] = error
                del self._pending[key]
        pixels = {key: one for key, one in read.items() if one.dtype == torch.uint8}
        if pixels:
            features = self._encode_pixels(torch.stack(list(pixels.values())).to(self._model.device))
            self.encoded += len(pixels)
            # Cloned, since a view would keep the whole stack in memory.
            read |= {key: one.clone() for key, one in zip(pixels, features, strict=True)}
        for key, one in read.items():
            # Not earlier: after an out-of-memory error the images are encoded again, in a smaller batch.
            del self._pending[key]
            self._features[key] = one.to(self._model.device)
            self._bytes += one.nbytes
