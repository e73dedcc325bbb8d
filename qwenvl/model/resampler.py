"""The adapter between vision and language: learned queries attend once to an image's patches."""

from math import isqrt

import torch
from torch import nn

from qwenvl.model.attention import AttentionLayer, attend
from qwenvl.model.configuration import QwenVLConfig

LAYER_NORM_EPS = 1e-6


def sine_cosine_grid(side: int, dim: int) -> torch.Tensor:
    """The 2-D position table of a square grid: (side * side, dim), float32, rows in reading order.

    The first half of the channels encodes the column, the second half the row; each half is the sines of all
    frequencies, then their cosines, with frequencies 10000 ** (-i / (dim / 4)).
    """
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    along_axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = along_axis.repeat(side, 1), along_axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def resize_grid(table: torch.Tensor, *, patches: int) -> torch.Tensor:
    """Resize a position table of a square grid to `patches` positions, bicubic, in float32.

    (positions, channels) -> (patches, channels), float32; a table that has this size is returned unchanged.
    """
    if table.shape[0] == patches:
        return table
    side, new_side = isqrt(table.shape[0]), isqrt(patches)
    grid = table.float().T.unflatten(1, (side, side))[None]
    resized = nn.functional.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T


class CrossAttention(AttentionLayer):
    """Multi-head attention with packed input projections, under the tensor names of `nn.MultiheadAttention`.

    It is not that class, whose `out_proj` is no plain `nn.Linear`: quantisation replaces only those, and adapters
    attach to it by name.
    """

    is_causal = False

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        width = config.require_visual()["output_dim"]
        self.heads = config.resampler_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query: (queries, width), the same for every image; key, value: (images, patches, width).

        Returns (images, queries, width).
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            nn.functional.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        output, _ = attend(self, query.expand(key.shape[0], -1, -1, -1), key, value)
        return self.out_proj(output)


class Resampler(nn.Module):
    """Compress an image's patches to a fixed number of features: learned queries attend to them."""

    pos_embed: torch.Tensor

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        visual = config.require_visual()
        width, output_dim = visual["width"], visual["output_dim"]
        self.query = nn.Parameter(torch.empty(config.n_queries, output_dim))
        # Never trained, but stored in the published files. A persistent buffer, not a frozen parameter, because
        # loading makes every parameter trainable.
        self.register_buffer("pos_embed", torch.empty(config.n_queries, output_dim))
        self.kv_proj = nn.Identity() if width == output_dim else nn.Linear(width, output_dim, bias=False)
        self.attn = CrossAttention(config)
        self.ln_q = nn.LayerNorm(output_dim, eps=LAYER_NORM_EPS)
        self.ln_kv = nn.LayerNorm(output_dim, eps=LAYER_NORM_EPS)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """patches: (images, patches, width) -> (images, n_queries, output_dim).

        Raises:
            ValueError: the patches do not form a square grid.
        """
        if isqrt(patches.shape[1]) ** 2 != patches.shape[1]:
            raise ValueError(f"an image must be a square grid of patches, not {patches.shape[1]} patches")
        # The resampler may be trained in float32 on top of a 16-bit vision transformer.
        values = self.ln_kv(self.kv_proj(patches.to(self.query.dtype)))
        query = self.ln_q(self.query)
        query = query + self.pos_embed.to(query.dtype)
        key = values + resize_grid(self.pos_embed, patches=patches.shape[1]).to(values.dtype)
        return self.attn(query, key, values)
