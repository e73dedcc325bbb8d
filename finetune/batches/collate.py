"""Samples to one batch: rendered, laid end to end without padding, images decoded to uint8 or their features found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune.batches.image_request import ImageRequest, VisionCache, read_pixels
from finetune.batches.images import image_columns
from finetune.data.checking import Rules
from finetune.data.shortening import Fitted, OnLong
from qwenvl import QwenVLImageProcessor, QwenVLTokenizer
from qwenvl.text.chat import IGNORED, LabelRule


@dataclass(frozen=True)
class Collator:
    """Makes batches in loader workers; pickles to them.

    Attributes:
        samples: a sequence of `finetune.data` samples, indexed by the batch's rows.
        labels, grounding, n_queries: see `chat.render_chat`.
        max_length, on_long: as the samples were checked; see `shortening.render_fitting`.
        vision_cache: has the features of images that were encoded before; None where there is none.
    """

    samples: Sequence[Any]
    tokenizer: QwenVLTokenizer
    image_processor: QwenVLImageProcessor
    labels: LabelRule
    grounding: bool
    n_queries: int
    max_length: int | None = None
    on_long: OnLong = "error"
    vision_cache: VisionCache | None = None

    def fit(self, messages: Sequence[Mapping[str, Any]]) -> Fitted:
        """A conversation as it is trained."""
        rules = Rules(
            self.tokenizer, self.max_length, self.n_queries, self.labels, self.grounding, on_long=self.on_long
        )
        return rules.fit(messages)

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> dict[str, torch.Tensor]:
        """Collate rows `{"sample": index into samples}`.

        Returns:
            `input_ids`, `labels`, `position_ids`: (1, tokens of all rows), positions beginning anew for each; the
            first label of each is -100, as nothing before it may predict it.
            `sequence_lengths`, `sequence_images`, `samples`: (rows,), tokens, images and index of each.
            `pixel_values`: (images, 3, S, S), uint8, in reading order; absent where there are none. Or features in
            their place, see `batch_images.image_columns`.

            Two rows of 3 and 2 tokens:

                input_ids        [[a, b, c, d, e]]
                position_ids     [[0, 1, 2, 0, 1]]
                sequence_lengths [3, 2]

        Raises:
            ImageError: an image that cannot be read; file and row are named.
            UserError: an image that was encoded is not what it was then.
        """
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        lengths, images = [], []
        requests: list[ImageRequest] = []
        for row in rows:
            sample = self.samples[row["sample"]]
            rendered = self.fit(sample.messages).rendered
            ids += rendered.ids
            labels += [IGNORED, *rendered.labels[1:]]
            positions += range(len(rendered.ids))
            lengths.append(len(rendered.ids))
            images.append(len(rendered.images))
            requests += [
                ImageRequest(source, sample.access, f"{sample.origin}, image {number}")
                for number, source in enumerate(rendered.images, start=1)
            ]
        return {
            "input_ids": torch.tensor([ids]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.tensor([positions]),
            "sequence_lengths": torch.tensor(lengths),
            "sequence_images": torch.tensor(images),
            "samples": torch.tensor([row["sample"] for row in rows]),
            **image_columns([self._image(request) for request in requests]),
        }

    def _image(self, request: ImageRequest) -> torch.Tensor:
        """(3, S, S) uint8, or features."""
        if self.vision_cache is not None:
            return self.vision_cache.get(request)
        return read_pixels(request, self.image_processor)
