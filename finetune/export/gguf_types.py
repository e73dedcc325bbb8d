"""Which type each tensor of a GGUF file is written in, as llama.cpp's own quantiser chooses."""

import re
from collections.abc import Sequence

TYPES = ("f16", "q8_0", "q4_0", "q4_k_m")
"""What `--type` takes."""

BITS = {"f16": "16", "q8_0": "8.5", "q4_0": "4.5", "q4_k_m": "4.5 to 6.6"}
"""Bits of a weight, with the scales of its block."""

# llama.cpp's names, in the places of Qwen2's.
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")

BLOCK_VALUES = {"F32": 1, "F16": 1, "Q8_0": 32, "Q5_0": 32, "Q4_0": 32, "Q4_K": 256, "Q6_K": 256}
FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0", "Q8_0": "F16", "Q5_0": "F16", "Q4_0": "F16"}
"""What is taken where a tensor's rows are no multiple of a type's block."""


def gguf_name(name: str) -> str:
    """The name in GGUF files of a tensor of Transformers' Qwen2."""
    if name in NAMES:
        return NAMES[name]
    found = _BLOCK.fullmatch(name)
    assert found is not None, f"{name} is no tensor of Qwen2"
    return f"blk.{found[1]}.{BLOCK_NAMES[found[2]]}.{found[3]}"


def tensor_type(name: str, shape: Sequence[int], kind: str, layers: int) -> str:
    """The type, by its name in GGUF, that a tensor has in a file of a kind.

    Norms and biases are float32. In q4_0 and q4_k_m the output head is in Q6_K, and in q4_k_m half of the attention's
    values and of the MLPs' last projections are too (llama.cpp, `llama-quant.cpp`, without an importance matrix).

    Args:
        name: as `gguf_name` gives it.
        shape: (rows, values of a row), or (values,).
        kind: one of `TYPES`.
        layers: of the model.
    """
    if len(shape) == 1:
        return "F32"
    if kind in ("f16", "q8_0"):
        found = kind.upper()
    elif name == "output.weight":
        found = "Q6_K"
    elif kind == "q4_0":
        found = "Q4_0"
    else:
        _, number, part, *_ = [*name.split("."), "", ""]
        more = part in ("attn_v", "ffn_down") and _has_more_bits(int(number), layers)
        found = "Q6_K" if more else "Q4_K"
    while shape[-1] % BLOCK_VALUES[found]:
        found = FALLBACK[found]
    return found


def _has_more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and each third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
