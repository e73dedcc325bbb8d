"""Floating point operations of a training step, from the sizes in the config: matrix products, each multiply-add as 2.

A linear of in x out weights takes 2 in out a token forward, as much for the gradient of its input, and as much again
for the gradient of its weights where it is trained (Kaplan et al., 2020, Scaling Laws for Neural Language Models,
section 2.1). Below a frozen linear something may still be trained, so the second is there and the third is not: with
LoRA a step is 2 passes over the base and 3 over the LoRA matrices. Attention multiplies queries with keys and weights
with values: 4 width a pair of positions forward, twice that backward, and half a forward more in kernels that do not
keep the scores (Dao, 2023, FlashAttention-2, section 3.1). Gradient checkpointing computes the decoder layers forward
once more. Norms, rotations, activations and the optimizer are left out: together they are below one percent.

The published model: 12.95 GFLOP a token a pass in the decoder's linears, 4.2 TFLOP an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from finetune.model.adapters import VISION
from finetune.model.components import component_of, published_name
from qwenvl import QwenVLConfig

IN_RESAMPLER_PER_QUERY = "attn_pool.attn.out_proj"
"""The linear of the visual side that runs once a query; the others run once a patch."""


@dataclass(frozen=True)
class Trained:
    """What of a model gets gradients.

    Attributes:
        lora: values in LoRA matrices of the language model, r (in + out) of each linear.
        last_lora: whether some of these are on the last linear of a layer, `mlp.c_proj`.
        tower_lora, query_lora: of the visual side, where they run once a patch and once a query.
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
        lora = {"lora": 0, "last_lora": False, "tower_lora": 0, "query_lora": 0}
        components = set()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if component_of(name) != "adapter":
                components.add(component_of(name))
            elif published_name(name).startswith(VISION):
                lora["query_lora" if IN_RESAMPLER_PER_QUERY in name else "tower_lora"] += parameter.numel()
            else:
                lora["lora"] += parameter.numel()
                lora["last_lora"] |= ".mlp.c_proj." in name
        return cls(**lora, **dict.fromkeys(components, True))


@dataclass(frozen=True)
class Forward:
    """What one forward, or several together, computes on.

    Attributes:
        tokens: positions that run through the decoder.
        pairs: of a query and a key, in one layer's attention.
        scored: positions that logits are computed for.
        images: encoded by the vision tower; those whose features were kept are not.
        calls: forwards with images, in each of which the resampler projects its queries once.
    """

    tokens: int
    pairs: int
    scored: int
    images: int
    calls: int = 1


def causal_pairs(lengths: Sequence[int]) -> int:
    """Pairs of a position with itself and each before it, in sequences that do not see each other."""
    return sum(length * (length + 1) // 2 for length in lengths)


def decoder_weights(config: QwenVLConfig) -> int:
    """Weights in the linears of all decoder layers: 6.476e9 in the published model."""
    return config.num_hidden_layers * (_layer_weights(config) + _last_linear(config))


def _layer_weights(config: QwenVLConfig) -> int:
    """Of one layer, without its last linear."""
    hidden, width = config.hidden_size, config.num_attention_heads * config.kv_channels
    return 4 * hidden * width + 2 * hidden * (config.intermediate_size // 2)


def _last_linear(config: QwenVLConfig) -> int:
    return (config.intermediate_size // 2) * config.hidden_size


def image_flops(config: QwenVLConfig) -> int:
    """Of one image through vision tower and resampler, forward: 4.2e12 in the published model."""
    return sum(_image(config).values()) if config.visual else 0


def _image(config: QwenVLConfig) -> dict[str, int]:
    """The parts of `image_flops`: linears and attention of the tower and of the resampler, apart.

    `tower_last` is the last linear of each layer, which checkpointing does not compute again.
    """
    visual = config.visual
    width, dim, queries = visual["width"], visual["output_dim"], config.n_queries
    patches = (visual["image_size"] // visual["patch_size"]) ** 2
    inner = int(width * visual["mlp_ratio"])
    return {
        "patches": 2 * patches * 3 * visual["patch_size"] ** 2 * width,
        "tower": 2 * patches * visual["layers"] * (4 * width**2 + width * inner),
        "tower_last": 2 * patches * visual["layers"] * width * inner,
        "tower_attention": 4 * patches**2 * width * visual["layers"],
        "into_resampler": 2 * patches * width * dim if width != dim else 0,
        # Keys and values once a patch; out_proj and the last projection once a query.
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
    """Forward and backward.

    Args:
        checkpointing: decoder layers (and those of a trained vision tower) are computed again in the backward, except
            for their last linear: PyTorch stops where the last tensor that the backward needs is there, which is
            before it (`torch.utils.checkpoint`, early stop), unless LoRA beside it comes later.
        keeps_attention: with checkpointing, attention is not computed again.
        fused_attention: the kernel computes the scores again in the backward, whatever checkpointing does.
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
    return flops + (_vision_flops(config, trained, forward, checkpointing, fused_attention) if config.visual else 0)


def _attention_flops(forward: int, fused: bool) -> int:
    """Forward and backward of an attention that takes `forward` forward."""
    return forward * 7 // 2 if fused else forward * 3


def _vision_flops(
    config: QwenVLConfig, trained: Trained, forward: Forward, checkpointing: bool, fused_attention: bool
) -> int:
    """Forward of the visual side, and backward as far down as something is trained."""
    part = {name: flops * forward.images for name, flops in _image(config).items()}
    if forward.images:
        part["resampler"] += 2 * config.n_queries * config.visual["output_dim"] ** 2 * forward.calls
    flops = sum(part.values())
    patches = forward.images * (config.visual["image_size"] // config.visual["patch_size"]) ** 2
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
