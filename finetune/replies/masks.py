"""Attention of rows of different lengths beside each other."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qwenvl import QwenVLConfig

MASKED = ("sdpa", "varlen", "eager")
"""Attention implementations that take a mask."""


def attention_mask(positions: torch.Tensor, width: int, config: QwenVLConfig, dtype: torch.dtype) -> torch.Tensor:
    """What the tokens at these positions see in a cache of rows, where a token's column is its position.

    Args:
        positions: (rows, new)
        width: columns of keys and values.
        dtype: of the model.

    Returns:
        (rows, 1, new, width) as the model's attention takes it: bool, or to be added to the scores.
    """
    seen = torch.arange(width, device=positions.device) <= positions[:, None, :, None]
    if config._attn_implementation != "eager":
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


@contextmanager
def takes_masks(config: QwenVLConfig) -> Iterator[None]:
    """Within, attention takes a mask: in place of an implementation that does not, it is SDPA."""
    own = config._attn_implementation
    if own in MASKED:
        yield
        return
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = own
