"""Initialisation of weights that no checkpoint provides."""

from math import isqrt

from torch import nn
from transformers import initialization as init

from qwenvl.model.configuration import QwenVLConfig
from qwenvl.model.language import RMSNorm
from qwenvl.model.resampler import CrossAttention, Resampler, sine_cosine_grid
from qwenvl.model.vision import VisionAttention, VisionMLP, VisionTransformer


def draw_weights(module: nn.Module, config: QwenVLConfig) -> None:
    """Initialise a module's own weights. Language model: normal(initializer_range); vision: as the published code."""
    if isinstance(module, nn.Linear):
        init.normal_(module.weight, std=config.initializer_range)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=config.initializer_range)
    elif isinstance(module, RMSNorm):
        init.ones_(module.weight)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, VisionTransformer):
        init.trunc_normal_(module.conv1.weight, std=0.02)
        init.normal_(module.positional_embedding, std=module.positional_embedding.shape[1] ** -0.5)
        init.normal_(module.proj, std=module.proj.shape[0] ** -0.5)
    elif isinstance(module, VisionAttention | VisionMLP | CrossAttention | Resampler):
        # Children come first, so their linear layers were drawn like the language model's: draw them again.
        for child in module.children():
            if isinstance(child, nn.Linear):
                init.trunc_normal_(child.weight, std=0.02)
        if isinstance(module, CrossAttention):
            init.trunc_normal_(module.in_proj_weight, std=0.02)
            init.zeros_(module.in_proj_bias)
        elif isinstance(module, Resampler):
            queries, output_dim = module.query.shape
            init.trunc_normal_(module.query, std=0.02)
            init.copy_(module.pos_embed, sine_cosine_grid(isqrt(queries), output_dim))
