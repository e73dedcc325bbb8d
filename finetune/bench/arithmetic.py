"""Floating point operations of a training step, from the config's sizes. A multiply-add of a matrix product counts 2.

A linear with in x out weights takes 2 in out operations per token forward, the same for the gradient of its input, and
the same again for the gradient of its weights if it is trained (Kaplan et al., 2020, Scaling Laws for Neural Language
Models, section 2.1). A frozen linear takes only the first two, as gradients pass through it: with LoRA a step is 2
passes over the base and 3 over the LoRA matrices. Attention multiplies queries by keys and weights by values: 4 width
operations per pair of positions forward, twice that backward, and half a forward more in kernels that do not keep the
scores (Dao, 2023, FlashAttention-2, section 3.1). Gradient checkpointing adds one forward of the decoder layers.
Norms, rotary embeddings, activation functions and the optimizer are left out: together they are below one percent.

The published model takes 12.95 GFLOP per token and pass in the decoder's linears, and 4.2 TFLOP per image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.model.adapters import VISION
from finetune.model.components import component_of, published_name
from qwenvl import QwenVLConfig

IN_RESAMPLER_PER_QUERY = "attn_pool.attn.out_proj"
"""The linear of the vision side that runs once per query; the others run once per patch."""


@dataclass(frozen=True)
class Trained:
    """Which weights of a model are trained.

    Attributes:
        lora: values in the language model's LoRA matrices, r (in + out) for each linear.
        last_lora: whether the last linear of a layer, `mlp.c_proj`, has LoRA.
        tower_lora, query_lora: values in the vision side's LoRA matrices that run once per patch, and once per query.
        language, embeddings, vision, resampler: whether the component's own weights are trained; embeddings with the
            output head.
    """

    lora: int = 0
    last_lora: bool = False
    tower_lora: int = 0
    query_lora: int = 0
    language: bool = False
    embeddings: bool = False
    vision: bool = False
    resampler: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> "Trained":
        """Read from a model, with PEFT around it or without."""
        lora = tower_lora = query_lora = 0
        last_lora = False
        components = set()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            component, size = component_of(name), parameter.numel()
            if component != "adapter":
                components.add(component)
            elif not published_name(name).startswith(VISION):
                lora += size
                last_lora |= ".mlp.c_proj." in name
            elif IN_RESAMPLER_PER_QUERY in name:
                query_lora += size
            else:
                tower_lora += size
        return cls(
            lora=lora,
            last_lora=last_lora,
            tower_lora=tower_lora,
            query_lora=query_lora,
            language="language" in components,
            embeddings="embeddings" in components,
            vision="vision" in components,
            resampler="resampler" in components,
        )


@dataclass(frozen=True)
class Forward:
    """Sizes of one forward, or of several together.

    Attributes:
        tokens: positions that run through the decoder.
        pairs: (query, key) pairs in one layer's attention.
        scored: positions with logits.
        images: encoded by the vision tower, without those from a vision cache.
        calls: forwards with images; the resampler projects its queries once in each.
    """

    tokens: int
    pairs: int
    scored: int
    images: int
    calls: int = 1


def causal_pairs(lengths: Sequence[int]) -> int:
    """(query, key) pairs of causal attention within each sequence."""
    return sum(length * (length + 1) // 2 for length in lengths)


def decoder_weights(config: QwenVLConfig) -> int:
    """Weights in the linears of all decoder layers: 6.476e9 in the published model."""
    return config.num_hidden_layers * (_layer_weights(config) + _last_linear(config))


def _layer_weights(config: QwenVLConfig) -> int:
    """Weights in one layer's linears, without the last linear."""
    hidden, width = config.hidden_size, config.num_attention_heads * config.kv_channels
    return 4 * hidden * width + 2 * hidden * (config.intermediate_size // 2)


def _last_linear(config: QwenVLConfig) -> int:
    return (config.intermediate_size // 2) * config.hidden_size


def image_flops(config: QwenVLConfig) -> int:
    """Operations of one image's forward through vision tower and resampler: 4.2e12 in the published model."""
    return sum(_image(config, config.visual).values()) if config.visual else 0


def _image(config: QwenVLConfig, visual: dict[str, Any]) -> dict[str, int]:
    """The parts of `image_flops`: linears and attention of the tower and of the resampler.

    `tower_last` is the last linear of each layer, which checkpointing does not compute again.
    """
    width, dim, queries = visual["width"], visual["output_dim"], config.n_queries
    patches = (visual["image_size"] // visual["patch_size"]) ** 2
    inner = int(width * visual["mlp_ratio"])
    return {
        "patches": 2 * patches * 3 * visual["patch_size"] ** 2 * width,
        "tower": 2 * patches * visual["layers"] * (4 * width**2 + width * inner),
        "tower_last": 2 * patches * visual["layers"] * width * inner,
        "tower_attention": 4 * patches**2 * width * visual["layers"],
        "into_resampler": 2 * patches * width * dim if width != dim else 0,
        # Keys and values once per patch; out_proj and the last projection once per query.
        "resampler": 2 * 2 * patches * dim**2 + 2 * 2 * queries * dim**2,
        "resampler_attention": 4 * queries * patches * dim,
    }


def training_flops(
    config: QwenVLConfig,
    trained: Trained,
    forward: Forward,
    *,
    checkpointing: bool = False,
    keeps_attention: bool = False,
    fused_attention: bool = False,
) -> int:
    """Operations of forward and backward.

    Args:
        checkpointing: decoder layers (and those of a trained vision tower) are computed again in the backward pass,
            up to the last tensor that it needs (`torch.utils.checkpoint`, early stop). That is before a layer's last
            linear, unless this has LoRA.
        keeps_attention: with checkpointing, attention is not computed again.
        fused_attention: the kernel recomputes the scores in its backward, with or without checkpointing.
    """
    tokens, layers = forward.tokens, config.num_hidden_layers
    attention = 4 * forward.pairs * config.num_attention_heads * config.kv_channels * layers
    flops = tokens * 2 * decoder_weights(config) * (3 if trained.language else 2)
    flops += tokens * 2 * trained.lora * 3
    flops += _attention_flops(attention, fused_attention)
    flops += 2 * config.hidden_size * config.vocab_size * forward.scored * (3 if trained.embeddings else 2)
    if checkpointing:
        again = layers * (_layer_weights(config) + (_last_linear(config) if trained.last_lora else 0))
        flops += tokens * 2 * (again + trained.lora)
        flops += 0 if keeps_attention else attention
    if config.visual:
        flops += _vision_flops(config, config.visual, trained, forward, checkpointing, fused_attention)
    return flops


def _attention_flops(forward: int, fused: bool) -> int:
    """Operations of forward and backward of an attention whose forward takes `forward`."""
    return forward * 7 // 2 if fused else forward * 3


def _vision_flops(
    config: QwenVLConfig,
    visual: dict[str, Any],
    trained: Trained,
    forward: Forward,
    checkpointing: bool,
    fused_attention: bool,
) -> int:
    """Operations of the vision side: forward, and backward down to the lowest trained weights."""
    part = {name: flops * forward.images for name, flops in _image(config, visual).items()}
    if forward.images:
        part["resampler"] += 2 * config.n_queries * visual["output_dim"] ** 2 * forward.calls
    flops = sum(part.values())
    patches = forward.images * (visual["image_size"] // visual["patch_size"]) ** 2
    flops += 2 * patches * trained.tower_lora * 3 + 2 * forward.images * config.n_queries * trained.query_lora * 3
    tower = trained.vision or trained.tower_lora > 0
    if tower or trained.resampler or trained.query_lora:
        flops += part["resampler"] * (2 if trained.resampler else 1)
        flops += _attention_flops(part["resampler_attention"], fused_attention) - part["resampler_attention"]
        flops += part["into_resampler"] * (tower + trained.resampler)
    if tower:
        flops += (part["tower"] + part["tower_last"]) * (2 if trained.vision else 1) + part["patches"] * trained.vision
        flops += _attention_flops(part["tower_attention"], fused_attention) - part["tower_attention"]
        flops += (part["tower"] + part["tower_attention"]) * checkpointing
    return flops
