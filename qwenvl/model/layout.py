"""The tensors that a configuration asks for, by name and shape, without building the model.

They are given one by one: whoever compares them with a checkpoint can stop at the first that is not there, however
many layers an absurd `config.json` asks for.
"""

from collections.abc import Iterator
from typing import NamedTuple

from qwenvl.model.configuration import QwenVLConfig

POSITIONS = 256
"""Rows of the vision transformer's position table: 16 x 16, from pre-training at 224 pixels."""


class ExpectedTensor(NamedTuple):
    """A tensor of the model under its published name.

    Attributes:
        linear: whether it is the weight of an `nn.Linear`, which may be in 4 bits.
    """

    name: str
    shape: tuple[int, ...]
    linear: bool = False


def expected_tensors(config: QwenVLConfig) -> Iterator[ExpectedTensor]:
    """Yield the tensors of `QwenVLForConditionalGeneration(config)`, as its `state_dict` has them."""
    yield ExpectedTensor("transformer.wte.weight", (config.vocab_size, config.hidden_size))
    for layer in range(config.num_hidden_layers):
        yield from _language_block(f"transformer.h.{layer}", config)
    yield ExpectedTensor("transformer.ln_f.weight", (config.hidden_size,))
    if config.visual is not None:
        yield from _vision_transformer("transformer.visual", config)
    yield ExpectedTensor("lm_head.weight", (config.vocab_size, config.hidden_size), linear=True)


def _language_block(prefix: str, config: QwenVLConfig) -> Iterator[ExpectedTensor]:
    hidden, inner = config.hidden_size, config.intermediate_size // 2
    width = config.num_attention_heads * config.kv_channels
    yield ExpectedTensor(f"{prefix}.ln_1.weight", (hidden,))
    yield from _linear(f"{prefix}.attn.c_attn", hidden, 3 * width)
    yield ExpectedTensor(f"{prefix}.attn.c_proj.weight", (hidden, width), linear=True)
    yield ExpectedTensor(f"{prefix}.ln_2.weight", (hidden,))
    yield ExpectedTensor(f"{prefix}.mlp.w1.weight", (inner, hidden), linear=True)
    yield ExpectedTensor(f"{prefix}.mlp.w2.weight", (inner, hidden), linear=True)
    yield ExpectedTensor(f"{prefix}.mlp.c_proj.weight", (hidden, inner), linear=True)


def _vision_transformer(prefix: str, config: QwenVLConfig) -> Iterator[ExpectedTensor]:
    visual = config.require_visual()
    width, patch, output_dim = visual["width"], visual["patch_size"], visual["output_dim"]
    yield ExpectedTensor(f"{prefix}.positional_embedding", (POSITIONS, width))
    yield ExpectedTensor(f"{prefix}.proj", (output_dim, output_dim))
    yield ExpectedTensor(f"{prefix}.conv1.weight", (width, 3, patch, patch))
    yield from _norm(f"{prefix}.ln_pre", width)
    for layer in range(visual["layers"]):
        yield from _vision_block(f"{prefix}.transformer.resblocks.{layer}", width, int(width * visual["mlp_ratio"]))
    yield from _resampler(f"{prefix}.attn_pool", width, output_dim, config.n_queries)
    yield from _norm(f"{prefix}.ln_post", output_dim)


def _vision_block(prefix: str, width: int, inner: int) -> Iterator[ExpectedTensor]:
    yield from _norm(f"{prefix}.ln_1", width)
    yield from _linear(f"{prefix}.attn.in_proj", width, 3 * width)
    yield from _linear(f"{prefix}.attn.out_proj", width, width)
    yield from _norm(f"{prefix}.ln_2", width)
    yield from _linear(f"{prefix}.mlp.c_fc", width, inner)
    yield from _linear(f"{prefix}.mlp.c_proj", inner, width)


def _resampler(prefix: str, width: int, output_dim: int, queries: int) -> Iterator[ExpectedTensor]:
    yield ExpectedTensor(f"{prefix}.query", (queries, output_dim))
    yield ExpectedTensor(f"{prefix}.pos_embed", (queries, output_dim))
    if width != output_dim:
        yield ExpectedTensor(f"{prefix}.kv_proj.weight", (output_dim, width), linear=True)
    yield ExpectedTensor(f"{prefix}.attn.in_proj_weight", (3 * output_dim, output_dim))
    yield ExpectedTensor(f"{prefix}.attn.in_proj_bias", (3 * output_dim,))
    yield from _linear(f"{prefix}.attn.out_proj", output_dim, output_dim)
    yield from _norm(f"{prefix}.ln_q", output_dim)
    yield from _norm(f"{prefix}.ln_kv", output_dim)


def _linear(prefix: str, inputs: int, outputs: int) -> Iterator[ExpectedTensor]:
    yield ExpectedTensor(f"{prefix}.weight", (outputs, inputs), linear=True)
    yield ExpectedTensor(f"{prefix}.bias", (outputs,))


def _norm(prefix: str, size: int) -> Iterator[ExpectedTensor]:
    yield ExpectedTensor(f"{prefix}.weight", (size,))
    yield ExpectedTensor(f"{prefix}.bias", (size,))
