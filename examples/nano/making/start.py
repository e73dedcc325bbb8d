"""The nano's sizes and initial weights.

Weights are initialised as in the real model, except for the position embeddings of patches and for the adapter, whose
queries attend to the patches at their own places.
"""

import json
import math
from pathlib import Path

import torch
from transformers import GenerationConfig

from examples.nano.making.page_symbols import place_waves
from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration, QwenVLProcessor
from qwenvl.model.resampler import Resampler, resize_grid
from qwenvl.model.vision import VisionTransformer

IMAGE_SIZE, LOW_IMAGE_SIZE, PATCH = 140, 112, 14
WIDTH = 192
CONTROL_TOKENS = 217
MAX_NEW_TOKENS = 200  # the longest transcription has fewer

# Initial weights of the vision transformer.
PLACE_CHANNELS = 48
FILTER_STD = 0.1  # content and position of a patch then have about the same magnitude

# Initial weights of the adapter. With the published ones, learning which query attends to which patch takes a large
# model and millions of images.
SHARPNESS = 160.0  # scale of the attention score of a query for the patch at its own place
QUIET = 0.1  # scale of content, relative to positions, in queries and keys
EMBEDDING_STD = 0.5  # of token embeddings, close to that of image features


def nano_config(ranks: int) -> QwenVLConfig:
    """The published layout at 4 M parameters, for a vocabulary of `ranks` byte-pair ranks."""
    return QwenVLConfig(
        architectures=["QWenLMHeadModel"],
        vocab_size=ranks + CONTROL_TOKENS + (-(ranks + CONTROL_TOKENS)) % 8,
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=3,
        kv_channels=64,
        intermediate_size=1024,
        seq_length=2048,
        max_position_embeddings=2048,
        visual={
            "heads": 3,
            "image_size": IMAGE_SIZE,
            "image_start_id": ranks + 214,
            "layers": 4,
            "mlp_ratio": 4,
            "n_queries": (IMAGE_SIZE // PATCH) ** 2,
            "output_dim": WIDTH,
            "patch_size": PATCH,
            "width": WIDTH,
        },
    )


def write_start(folder: Path, vocabulary: bytes, seed: int) -> None:
    """Write the initial checkpoint: configuration, vocabulary and weights, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = vocabulary.count(b"\n")
    (folder / "qwen.tiktoken").write_bytes(vocabulary)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 2048, "tokenizer_class": "QWenTokenizer"}, indent=2) + "\n"
    )
    torch.manual_seed(seed)
    model = QwenVLForConditionalGeneration(nano_config(ranks))
    with torch.no_grad():
        model.transformer.wte.weight.normal_(0, EMBEDDING_STD)
        mark_places(model.transformer.visual)
        look_ahead(model.transformer.visual.attn_pool)
    model.generation_config = GenerationConfig(
        chat_format="chatml", eos_token_id=ranks, pad_token_id=ranks, do_sample=False, max_new_tokens=MAX_NEW_TOKENS
    )
    model.save_pretrained(folder)
    QwenVLProcessor.from_pretrained(folder)  # fails if what was written cannot be read


@torch.no_grad()
def mark_places(visual: VisionTransformer) -> None:
    """Set position embeddings to sines of row and column, in channels of their own.

    Random position embeddings do not tell which patches are neighbours, and a letter often lies on two. Filters have a
    mean of zero: they respond to ink on paper, not to the colour of the paper.
    """
    table = visual.positional_embedding.zero_()
    table[:, :PLACE_CHANNELS] = place_waves(math.isqrt(len(table)), PLACE_CHANNELS, IMAGE_SIZE // PATCH)
    filters = visual.conv1.weight.normal_(0, FILTER_STD)
    filters -= filters.mean((2, 3), keepdim=True)
    filters[:PLACE_CHANNELS] = 0


@torch.no_grad()
def look_ahead(resampler: Resampler) -> None:
    """Make every query attend to the patch at its own place on the page, and pass its content on unchanged.

    Attention scores use the position table alone, and only its high frequencies: the low ones are nearly the same at
    all places.
    """
    width = resampler.query.shape[1]
    resampler.ln_q.weight.fill_(QUIET)
    resampler.ln_kv.weight.fill_(QUIET)
    frequencies = 10000.0 ** (-torch.arange(width // 4) / (width / 4))
    fast = (frequencies > 0.15).float().repeat(4)  # columns' sines and cosines, then rows'
    query, key, value = resampler.attn.in_proj_weight.chunk(3)
    chosen = torch.diag(fast)
    # The single attention head divides scores by the square root of the width.
    scale = SHARPNESS * width**0.5 / fast.sum()
    query.copy_(chosen * scale**0.5)
    key.copy_(chosen * scale**0.5)
    value.copy_(torch.eye(width) / QUIET)
    resampler.attn.out_proj.weight.copy_(torch.eye(width))
    resampler.attn.out_proj.bias.zero_()


def place_weights(resampler: Resampler, patches: int) -> torch.Tensor:
    """Initial attention weights of each query for each patch, by position: (queries, patches), rows sum to 1."""
    query, key, _ = resampler.attn.in_proj_weight.detach().chunk(3)
    table = resampler.get_buffer("pos_embed")
    scores = (table @ query.T) @ (resize_grid(table, patches=patches) @ key.T).T
    return (scores / table.shape[1] ** 0.5).softmax(-1)
