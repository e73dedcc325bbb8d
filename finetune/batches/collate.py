"""Samples to one batch: rendered, concatenated without padding, with decoded images or their cached features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import get_worker_info

from finetune.batches.image_request import ImageRequest, VisionCache, read_pixels
from finetune.batches.images import image_columns
from finetune.data.checks.rules import Rules
from finetune.data.places import Gone
from finetune.data.sample import BadRow
from finetune.data.samples import Samples
from finetune.errors import InputError, UserError
from qwenvl import QwenVLImageProcessor, QwenVLTokenizer
from qwenvl.images.images import ImageError, ImageReader
from qwenvl.text.chat import IGNORED

LEFT_OUT = "left_out"
NO_SAMPLE = -1
"""The index of an empty place, whose sample was left out, or which is behind the last one of an epoch."""


class BatchError(UserError):
    """A batch that cannot be made from the user's data, in a loader worker.

    PyTorch raises a worker's error in the training process as `type(error)(text)`, where the text is the worker's
    traceback. This keeps the message at its end.
    """

    def __init__(self, text: str):
        super().__init__(text.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2].rstrip())


class _Rendered(NamedTuple):
    """What a row becomes: ids and labels, and its images as pixels or features, in reading order."""

    ids: Sequence[int]
    labels: Sequence[int]
    images: Sequence[torch.Tensor]


@dataclass(frozen=True)
class Collator:
    """Makes batches in loader workers; pickles to them.

    Attributes:
        samples: indexed by the batch's rows.
        rules: those that the samples were checked by.
        image_processor: makes pixels of an image.
        vision_cache: has the features of images that were encoded before; None reads every image.
    """

    samples: Samples
    rules: Rules
    image_processor: QwenVLImageProcessor
    vision_cache: VisionCache | None = None

    @property
    def tokenizer(self) -> QwenVLTokenizer:
        return self.rules.tokenizer

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """Collate rows `{"sample": index into samples}`.

        A sample whose row or images cannot be read leaves its place empty: one token without an image that is not
        trained, so that a batch has as many sequences as rows whatever is left out, and none is without tokens. The
        index `NO_SAMPLE` is such a place.

        Returns:
            `input_ids`, `labels`, `position_ids`: (1, tokens of all rows), positions start at 0 in each row; the
            first label of each is -100, as nothing before it may predict it.
            `sequence_lengths`, `sequence_images`, `samples`: (rows,), tokens, images and index of each; the index of
            an empty place is `NO_SAMPLE`.
            `pixel_values`: (images, 3, S, S), uint8, in reading order; absent where there are none. Or features in
            their place, see `images.image_columns`.
            `left_out`: a list of (index, origin, reason), of each sample that was left out; absent where none was.

            Two rows of 3 and 2 tokens:

                input_ids        [[a, b, c, d, e]]
                position_ids     [[0, 1, 2, 0, 1]]
                sequence_lengths [3, 2]

        Raises:
            DataError: a data file cannot be read.
            UserError: an image has changed since it was encoded.
        """
        try:
            return self._collate(rows)
        except InputError as error:
            if get_worker_info() is None:
                raise
            raise BatchError(str(error)) from None

    def _collate(self, rows: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        lengths, images, samples = [], [], []
        read: list[torch.Tensor] = []
        left_out: list[tuple[int, str, str]] = []
        for row in rows:
            rendered = self._rendered(row["sample"], left_out)
            if rendered is None:
                rendered = _Rendered([self.tokenizer.eod_id], [IGNORED], [])
                samples.append(NO_SAMPLE)
            else:
                samples.append(row["sample"])
            ids += rendered.ids
            labels += [IGNORED, *rendered.labels[1:]]
            positions += range(len(rendered.ids))
            lengths.append(len(rendered.ids))
            images.append(len(rendered.images))
            read += rendered.images
        return {
            "input_ids": torch.tensor([ids]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.tensor([positions]),
            "sequence_lengths": torch.tensor(lengths),
            "sequence_images": torch.tensor(images),
            "samples": torch.tensor(samples),
            **image_columns(read),
            **({LEFT_OUT: left_out} if left_out else {}),
        }

    def _rendered(self, index: int, left_out: list[tuple[int, str, str]]) -> "_Rendered | None":
        """A sample with its images; None, and why in `left_out`, where it cannot be read."""
        if index == NO_SAMPLE:
            return None
        origin = ""
        try:
            sample = self.samples[index]
            origin = str(sample.origin)
            rendered = self.rules.fit(sample.messages).rendered
            requests = [
                ImageRequest(source, sample.access, f"{origin}, image {1 + place // self.rules.pictures}")
                for place, source in enumerate(rendered.images)
            ]
            reader = ImageReader()
            images = [self._image(request, reader) for request in requests]
            return _Rendered(rendered.ids, rendered.labels, images)
        except Gone:
            pass
        except BadRow as error:
            left_out.append((index, str(error.origin), str(error)))
        except ImageError as error:
            left_out.append((index, origin, str(error)))
        return None

    def _image(self, request: ImageRequest, reader: ImageReader) -> torch.Tensor:
        """(3, S, S) uint8, or features."""
        if self.vision_cache is not None:
            return self.vision_cache.get(request, reader)
        return read_pixels(request, self.image_processor, reader)
