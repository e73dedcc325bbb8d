"""Groups of images that are to be encoded: what loader workers decode, in which order, and what cannot be read."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from finetune.batches.budget import ENCODED_TOGETHER
from finetune.batches.image_request import read_pixels
from finetune.vision_cache.cache import ImageHandles, content_key, settle
from finetune.vision_cache.run_images import Entry, RunImages
from finetune.vision_cache.store import FeatureStore
from qwenvl import QwenVLImageProcessor
from qwenvl.images.images import ImageError, ImageReader

Wanted = tuple[bytes, Entry]
"""An image to encode: its handle, and where the run has it."""


class ReadImage(NamedTuple):
    """A decoded image, (3, S, S) uint8, or the problem with it; or why it cannot be read at all."""

    handle: bytes
    pixels: torch.Tensor | None
    problem: str | None
    unreadable: str | None = None


class ImageGroup(NamedTuple):
    """Decoded images: (handle, content) of each and their pixels, (images, 3, S, S) uint8; the problems of others; and
    by handle why others cannot be read."""

    entries: list[tuple[bytes, bytes]]
    pixels: torch.Tensor
    problems: list[str]
    unreadable: dict[bytes, str]


@dataclass
class WantedPixels(Dataset[ReadImage]):
    """Decodes wanted images, in loader workers."""

    images: RunImages
    handles: ImageHandles
    image_processor: QwenVLImageProcessor

    def __getitem__(self, wanted: Wanted) -> ReadImage:
        return self._read(wanted, ImageReader())

    def __getitems__(self, group: list[Wanted]) -> list[ReadImage]:
        """A group in the order of the data, where the pictures of one image are neighbours: it is decoded once."""
        reader = ImageReader()
        return [self._read(wanted, reader) for wanted in group]

    def _read(self, wanted: Wanted, reader: ImageReader) -> ReadImage:
        handle, entry = wanted
        request = self.images.request(entry)
        settle(request.source, request.access)
        try:
            pixels = read_pixels(request, self.image_processor, reader)
        except ImageError as error:
            return ReadImage(handle, None, None, str(error))
        if self.handles.of(request.source, request.access) != handle:
            return ReadImage(handle, None, f"{request.name}: it was changed while the run began")
        return ReadImage(handle, pixels, None)


def together(read: Sequence[ReadImage]) -> ImageGroup:
    """What was read of a group, for the loader to collate with."""
    good = [(one.handle, one.pixels) for one in read if one.pixels is not None]
    return ImageGroup(
        [(handle, content_key(pixels)) for handle, pixels in good],
        torch.stack([pixels for _, pixels in good]) if good else torch.empty(0, 3, 0, 0, dtype=torch.uint8),
        [one.problem for one in read if one.problem is not None],
        {one.handle: one.unreadable for one in read if one.unreadable is not None},
    )


@dataclass
class LeftGroups:
    """Groups of images that are still to be encoded, as a batch sampler; without those that another run encodes.

    Runs of the same data begin at random places, so that they share the work.

    Attributes:
        room: how many more images may be encoded; the user of the groups counts it down. No group follows at 0.
        done: called with the number of images that need no encoding.
    """

    wanted: Sequence[Wanted]
    room: int
    store: FeatureStore
    done: Callable[[int], None]

    def __iter__(self) -> Iterator[list[Wanted]]:
        starts = list(range(0, len(self.wanted), ENCODED_TOGETHER))
        first = secrets.randbelow(len(starts))
        for start in starts[first:] + starts[:first]:
            if self.room <= 0:
                return
            self.store.refresh()
            group = self.wanted[start : start + ENCODED_TOGETHER]
            left = [one for one in group if not self.store.has(one[0])]
            self.done(len(group) - len(left))
            if left:
                yield left
