"""Recipes of every kind of training on the tiny checkpoint, as they are planned and as they are."""

from pathlib import Path

import torch
from torch import nn

from finetune.memory.activations import batch_of_shapes
from finetune.memory.workload import Workload
from finetune.model.base import make_trainable
from finetune.model.computing import choose_dtype, quantization_arguments
from finetune.recipe import Recipe, parse_recipe
from qwenvl import QwenVLConfig, load_model

TINY = str(Path(__file__).parent.parent.parent / "examples" / "tiny")

RECIPE = f"""
model: {{path: {TINY}, dtype: float32}}
adapter: {{train_embeddings: false}}
data: {{train: {{path: rows.jsonl, format: messages}}, max_length: 400}}
output: run
"""

EVERYTHING_IN_FULL = ["adapter=null", "freeze.language=false", "freeze.vision=false", "freeze.resampler=false"]
ALL_IN_4_BITS = ["model.quantization=nf4", "model.quantize=[language,vision,head]", "model.embeddings_on_cpu=true"]

KINDS = {
    "lora": [],
    "lora bfloat16": ["model.dtype=bfloat16"],
    "lora, embeddings and vision in full": [
        *("model.dtype=bfloat16", "adapter.train_embeddings=true", "freeze.vision=false", "freeze.resampler=false")
    ],
    "resampler": ["freeze.resampler=false", "adapter.dropout=0"],
    "dora on vision": ["adapter.dora=true", "adapter.vision_targets=[in_proj, c_fc]"],
    "q-lora": ["model.dtype=bfloat16", *ALL_IN_4_BITS],
    "q-lora of the language model": ["model.quantization=nf4"],
    "in full": EVERYTHING_IN_FULL,
    "in full, 16 bits": ["model.dtype=bfloat16", *EVERYTHING_IN_FULL],
    "resampler and language in full, 16 bits": [
        *("model.dtype=bfloat16", "adapter=null", "freeze.language=false", "freeze.resampler=false")
    ],
}

ONE = Workload(tokens=300, supervised=20, sequences=1, images=1, sequence_length=300)
THREE = Workload(tokens=700, supervised=300, sequences=3, images=2, sequence_length=300)


def recipe_of(*overrides: str) -> Recipe:
    return parse_recipe(RECIPE, list(overrides))


def tiny_config() -> QwenVLConfig:
    return QwenVLConfig.from_pretrained(TINY)


def real_model(recipe: Recipe) -> nn.Module:
    """As a run loads it on the CPU, with what is trained requiring gradients."""
    quantization = quantization_arguments(recipe.model)
    model = load_model(
        TINY,
        dtype=choose_dtype(recipe.model.dtype),
        device_map="cpu" if quantization else None,
        embeddings_on_cpu=recipe.model.embeddings_on_cpu,
        **quantization,
    )
    return make_trainable(model, recipe)


def real_batch(workload: Workload) -> dict:
    batch = batch_of_shapes(tiny_config(), workload)
    if "pixel_values" in batch:
        batch["pixel_values"] = torch.randint(0, 256, batch["pixel_values"].shape, dtype=torch.uint8)
    return batch
