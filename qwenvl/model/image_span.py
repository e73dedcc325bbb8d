"""Where the images of a batch are in its token ids."""

import torch

from qwenvl.errors import InputError
from qwenvl.model.configuration import QwenVLConfig


def image_span_starts(input_ids: torch.Tensor, config: QwenVLConfig) -> torch.Tensor:
    """Mark the `<img>` of every complete image span: `<img>`, n_queries times `<imgpad>`, `</img>`.

    Only complete spans count: a single `<img>` or `<imgpad>` that the model sampled keeps its own embedding. For a
    text-only checkpoint nothing is marked.

    Args:
        input_ids: (batch, length)

    Returns:
        (batch, length), bool
    """
    n, pad_id = config.n_queries, config.image_token_id
    starts = torch.zeros_like(input_ids, dtype=torch.bool)
    if pad_id is None or input_ids.shape[1] < n + 2:
        return starts
    pads_before = torch.nn.functional.pad((input_ids == pad_id).cumsum(dim=1), (1, 0))
    # Candidate k is a span with `<img>` at k, `<imgpad>` at k + 1 .. k + n, and `</img>` at k + n + 1.
    starts[:, : -n - 1] = (
        (input_ids[:, : -n - 1] == config.image_start_id)
        & (pads_before[:, n + 1 : -1] - pads_before[:, 1 : -n - 1] == n)
        & (input_ids[:, n + 1 :] == config.image_end_id)
    )
    return starts


def place_image_features(
    embeddings: torch.Tensor, input_ids: torch.Tensor, features: torch.Tensor | None, config: QwenVLConfig
) -> torch.Tensor:
    """Replace the embeddings of image positions by image features, out of place, so that both sides get gradients.

    Args:
        embeddings: (batch, length, hidden)
        input_ids: (batch, length)
        features: (images, n_queries, hidden), the batch's images in reading order; None without images.

    Returns:
        (batch, length, hidden)

    Raises:
        InputError: more or fewer features than image spans.
    """
    starts = image_span_starts(input_ids, config)
    spans, images = int(starts.sum()), 0 if features is None else len(features)
    if spans != images:
        raise InputError(
            f"input_ids hold {spans} whole image span(s) (<img>, {config.n_queries} x <imgpad>, </img>) but "
            f"{images} image(s) were given: pass pixel_values (or image_features) with one entry per image, in "
            "reading order, and do not truncate inside an image"
        )
    if features is None or not spans:
        return embeddings
    opened = starts.cumsum(dim=1)
    closed = torch.nn.functional.pad(opened, (config.n_queries + 1, 0))[:, : -config.n_queries - 1]
    positions = (opened > closed) & ~starts
    return embeddings.masked_scatter(positions[..., None], features.to(embeddings))
