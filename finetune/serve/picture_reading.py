"""Threads that decode the pictures of requests which wait."""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from finetune.batches.image_request import ImageRequest, image_key, read_pixels
from finetune.serve.feature_cache import FeatureCache
from qwenvl import QwenVLImageProcessor
from qwenvl.images.images import ImageReader

READERS = 4  # Pillow releases the GIL while it decodes and resizes


@dataclass
class Picture:
    """A picture of a prompt, once it is read.

    Attributes:
        key: the same for the same pixels and the same weights.
        pixels: (3, S, S) uint8, until it is encoded; None where its features were kept.
        features: (n_queries, hidden), once it is encoded.
    """

    key: str
    pixels: torch.Tensor | None = None
    features: torch.Tensor | None = None


class PictureReaders:
    """Reads the pictures of one request after the other, in the order in which they are given.

    The threads are daemons: a program that ends does not wait for a URL.

    Args:
        image_processor: of the model.
        cache: pictures whose features it has are not decoded.
    """

    def __init__(self, image_processor: QwenVLImageProcessor, cache: FeatureCache) -> None:
        self._image_processor, self._cache = image_processor, cache
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        for number in range(READERS):
            threading.Thread(target=self._work, name=f"read-pictures-{number}", daemon=True).start()

    def read(
        self,
        requests: Sequence[ImageRequest],
        key_prefix: str,
        is_wanted: Callable[[], bool],
        done: Callable[[list[Picture] | Exception], None],
    ) -> None:
        """Read pictures in a thread; returns at once.

        Args:
            requests: the pictures, in reading order.
            key_prefix: which weights encode them.
            is_wanted: asked before each picture; once it is False, nothing more is read and `done` is not called.
            done: called in the thread, with the pictures or with why one cannot be read.
        """

        def task() -> None:
            reader = ImageReader()  # pictures of one image are cut from it, decoded once
            pictures: list[Picture] = []
            try:
                for request in requests:
                    if not is_wanted():
                        return
                    key = f"{key_prefix}{image_key(request.source, request.access)}"
                    features = self._cache.get(key)
                    pixels = None if features is not None else read_pixels(request, self._image_processor, reader)
                    pictures.append(Picture(key, pixels, features))
            except Exception as error:
                done(error)
            else:
                done(pictures)

        self._tasks.put(task)

    def close(self) -> None:
        """End the threads, once they have read what they were given."""
        for _ in range(READERS):
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
