"""Where a batch's images stand in its token ids."""

import torch

from qwenvl.model.configuration import QwenVLConfig


def image_span_starts(input_ids: torch.Tensor, config: QwenVLConfig) -> torch.Tensor:
    """Mark the `<img>` of every complete image span: `<img>`, n_queries times `<imgpad>`, `</img>`.

    Only complete spans count: a stray `<img>` or `<imgpad>` that the model sampled keeps its own embedding.

    Args:
        input_ids: (batch, length)

    Returns:
        (batch, length), bool
    """
    n = config.n_queries
    starts = torch.zeros_like(input_ids, dtype=torch.bool)
    if input_ids.shape[1] < n + 2:
        return starts
    pads_before = torch.nn.functional.pad((input_ids == config.image_token_id).cumsum(dim=1), (1, 0))
    # Candidate k is a span that begins with `<img>` at k, holds pads at k + 1 .. k + n, and ends at k + n + 1.
    starts[:, : -n - 1] = (
        (input_ids[:, : -n - 1] == config.image_start_id)
        & (pads_before[:, n + 1 : -1] - pads_before[:, 1 : -n - 1] == n)
        & (input_ids[:, n + 1 :] == config.image_end_id)
    )
    return starts


def place_image_features(
    embeddings: torch.Tensor, input_ids: torch.Tensor, features: torch.Tensor | None, config: QwenVLConfig
) -> torch.Tensor:
    """Put image features over the embeddings of their positions, out of place, so that both sides get gradients.

    Args:
        embeddings: (batch, length, hidden)
        input_ids: (batch, length)
        features: (images, n_queries, hidden), the batch's images in reading order; None where there are none.

    Returns:
        (batch, length, hidden)

    Raises:
        ValueError: more or fewer features than image spans.
    """
    starts = image_span_starts(input_ids, config)
    spans, images = int(starts.sum()), 0 if features is None else len(features)
    if spans != images:
        raise ValueError(
            f"input_ids hold {spans} whole image span(s) (<img>, {config.n_queries} x <imgpad>, </img>) but "
            f"{images} image(s) were given: pass pixel_values (or image_features) with one entry an image, in reading "
            "order, and do not truncate inside an image"
        )
    if not spans:
        return embeddings
    opened = starts.cumsum(dim=1)
    closed = torch.nn.functional.pad(opened, (config.n_queries + 1, 0))[:, : -config.n_queries - 1]
    positions = (opened > closed) & ~starts
    return embeddings.masked_scatter(positions[..., None], features.to(embeddings))
