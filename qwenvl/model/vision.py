"""The vision transformer: pixels -> patch features -> (through the resampler) image features."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qwenvl.errors import InputError
from qwenvl.model.attention import AttentionLayer, attend
from qwenvl.model.configuration import QwenVLConfig
from qwenvl.model.resampler import LAYER_NORM_EPS, Resampler, resize_grid


class VisionAttention(AttentionLayer):
    """Self-attention over patches. `in_proj`'s output is laid out per head: each head's slice is q | k | v."""

    is_causal = False

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        visual = config.require_visual()
        width = visual["width"]
        self.heads = visual["heads"]
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (images, patches, width) -> the same shape."""
        query, key, value = self.in_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, dim=-1)
        output, _ = attend(self, query, key, value)
        return self.out_proj(output)


class VisionMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class VisionBlock(GradientCheckpointingLayer):
    """One pre-norm encoder layer."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        visual = config.require_visual()
        width = visual["width"]
        self.ln_1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = VisionAttention(config)
        self.ln_2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = VisionMLP(width, int(width * visual["mlp_ratio"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionBlocks(nn.Module):
    """The stack of blocks. It is a module because the published tensor names have this level."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(VisionBlock(config) for _ in range(config.require_visual()["layers"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class VisionTransformer(nn.Module):
    """The vision encoder with its resampler: images to features of the language model's width."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        visual = config.require_visual()
        width, patch, output_dim = visual["width"], visual["patch_size"], visual["output_dim"]
        self.patch_size = patch
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        # 16 x 16 positions, from pre-training at 224 pixels; resized to the patch grid of the input.
        self.positional_embedding = nn.Parameter(torch.empty(256, width))
        self.ln_pre = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.transformer = VisionBlocks(config)
        self.attn_pool = Resampler(config)
        self.ln_post = nn.LayerNorm(output_dim, eps=LAYER_NORM_EPS)
        self.proj = nn.Parameter(torch.empty(output_dim, output_dim))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode images.

        Args:
            pixels: (images, 3, S, S), normalised; S a multiple of the patch size, not necessarily the configured one.

        Returns:
            (images, n_queries, output_dim)

        Raises:
            InputError: pixels of another shape.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] != pixels.shape[3]:
            raise InputError(f"pixel_values must be (images, 3, S, S), not {tuple(pixels.shape)}")
        if pixels.shape[-1] % self.patch_size:
            raise InputError(
                f"pixel_values are {pixels.shape[-1]} pixels wide: not a multiple of the patch size {self.patch_size}"
            )
        x = self.conv1(pixels.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        x = self.ln_pre(x + resize_grid(self.positional_embedding, patches=x.shape[1]).to(x.dtype))
        x = self.attn_pool(self.transformer(x)).to(self.proj.dtype)
        return self.ln_post(x) @ self.proj
