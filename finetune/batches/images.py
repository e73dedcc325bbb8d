"""The images of a batch: pixels to encode, cached features, or some of each."""

from collections.abc import Sequence

import torch

from qwenvl import QwenVLForConditionalGeneration

PIXELS, FEATURES, CACHED = "pixel_values", "image_features", "image_cached"


def image_columns(images: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch's columns for its images.

    Args:
        images: in reading order; each (3, S, S) uint8 pixels or (n_queries, hidden) features.

    Returns:
        `pixel_values`: (images with pixels, 3, S, S), `image_features`: (the others, n_queries, hidden), each left out
        where there are none. Where there are both, `image_cached`: (images,), bool, says which are which.
    """
    cached = torch.tensor([image.dtype != torch.uint8 for image in images], dtype=torch.bool)
    columns = {}
    for name, wanted in ((PIXELS, False), (FEATURES, True)):
        if chosen := [image for image, is_cached in zip(images, cached.tolist(), strict=True) if is_cached == wanted]:
            columns[name] = torch.stack(chosen)
    return columns | ({CACHED: cached} if len(columns) == 2 else {})


def cut_images(batch: dict[str, torch.Tensor], numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    """The columns of some images of a batch.

    Args:
        numbers: (images to take,), in the order to take them; at least one.
    """
    if CACHED not in batch:
        return {name: batch[name][numbers] for name in (PIXELS, FEATURES) if name in batch}
    cached = batch[CACHED]
    numbers = numbers.to(cached.device)
    rows = torch.where(cached, cached.cumsum(0), (~cached).cumsum(0)) - 1  # of each image in its own column
    sides = {FEATURES: numbers[cached[numbers]], PIXELS: numbers[~cached[numbers]]}
    columns = {name: batch[name][rows[taken]] for name, taken in sides.items() if len(taken)}
    return columns | ({CACHED: cached[numbers]} if len(columns) == 2 else {})


def image_arguments(
    model: QwenVLForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor | None]:
    """What a forward is given for the images of a batch: `pixel_values` or `image_features`, never both.

    Args:
        model: without wrappers; encodes here, without gradients, what some but not all images of the batch lack.
        batch: on the model's device.
    """
    if CACHED not in batch:
        return {name: batch.get(name) for name in (PIXELS, FEATURES)}
    cached, features = batch[CACHED], batch[FEATURES]
    with torch.no_grad():
        encoded = model.get_image_features(batch[PIXELS]).to(features.dtype)
    together = features.new_empty(len(cached), *features.shape[1:])
    together[cached], together[~cached] = features, encoded
    return {PIXELS: None, FEATURES: together}
