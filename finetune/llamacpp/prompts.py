"""Prompts with images for a language model that takes tokens or embeddings in one call, not both."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from finetune.llamacpp.language_model import LanguageModel, Positions
from qwenvl import QwenVLConfig
from qwenvl.errors import InputError
from qwenvl.model.image_span import image_span_starts


@dataclass(frozen=True)
class ImagePlace:
    """The features of an image in a prompt: positions `start` to before `stop`."""

    start: int
    stop: int
    features: torch.Tensor


def image_places(ids: Sequence[int], features: Sequence[torch.Tensor], config: QwenVLConfig) -> list[ImagePlace]:
    """Where the images of a prompt are.

    Args:
        ids: of the prompt; an image is `<img>`, n_queries x `<imgpad>`, `</img>`.
        features: (n_queries, hidden) of each image, in reading order.
        config: of the model.

    Raises:
        InputError: there are more or fewer images than features.
    """
    starts = image_span_starts(torch.tensor([list(ids)]), config)[0].nonzero()[:, 0].tolist()
    if len(starts) != len(features):
        raise InputError(
            f"the prompt has {len(starts)} whole image span(s), and features of {len(features)} image(s) were given"
        )
    return [
        ImagePlace(start + 1, start + 1 + config.n_queries, one) for start, one in zip(starts, features, strict=True)
    ]


def prefill(
    model: LanguageModel, sequence: int, ids: Sequence[int], images: Sequence[ImagePlace], start: int = 0
) -> torch.Tensor:
    """Compute a prompt, from a position on that follows what the sequence holds.

    Returns:
        (vocabulary,) logits after its last token.

    Raises:
        torch.OutOfMemoryError: there are not enough free cells; a part of the prompt may be in the sequence.
    """
    assert start < len(ids), "at least one position is to be computed"
    logits = None
    for first, stop, image in _segments(len(ids), images, start):
        at = Positions(range(first, stop), [sequence] * (stop - first), [stop - first - 1] if stop == len(ids) else [])
        if image is None:
            logits = model.decode_tokens(ids[first:stop], at)
        else:
            logits = model.decode_embeddings(image.features[first - image.start : stop - image.start], at)
    assert logits is not None and len(logits) == 1, "the last position was asked for"
    return logits[0]


def _segments(length: int, images: Sequence[ImagePlace], start: int) -> Iterator[tuple[int, int, ImagePlace | None]]:
    """(first, stop, image or None) of the stretches of tokens and of features, from `start` on."""
    for image in images:
        if image.stop <= start:
            continue
        if start < image.start:
            yield start, image.start, None
        yield max(start, image.start), image.stop, image
        start = image.stop
    if start < length:
        yield start, length, None
