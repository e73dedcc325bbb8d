"""The types of a GGUF file's tensors are those that llama.cpp's own quantiser takes."""

import pytest

from finetune.export.gguf_types import TYPES, gguf_name, tensor_type

WIDE = (11008, 4096)


@pytest.mark.parametrize("kind", TYPES)
def test_norms_and_biases_are_float32(kind):
    assert {tensor_type(name, (4096,), kind, 32) for name in ("blk.3.attn_norm.weight", "blk.3.attn_q.bias")} == {
        "F32"
    }


def test_one_type_for_all_matrices_where_that_is_its_rule():
    names = ("token_embd.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight")
    for kind, expected in (("f16", "F16"), ("q8_0", "Q8_0"), ("q4_0", "Q4_0")):
        assert {tensor_type(name, WIDE, kind, 32) for name in names} == {expected}
    heads = [tensor_type("output.weight", WIDE, kind, 32) for kind in TYPES]
    assert heads == ["F16", "Q8_0", "Q6_K", "Q6_K"]


def test_q4_k_m_gives_half_of_two_matrices_more_bits():
    """The layers of llama.cpp's use_more_bits, of 32: the first and last 4, and each third between."""
    for part in ("attn_v", "ffn_down"):
        found = [
            layer for layer in range(32) if tensor_type(f"blk.{layer}.{part}.weight", WIDE, "q4_k_m", 32) == "Q6_K"
        ]
        assert found == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    others = ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up")
    assert {tensor_type(f"blk.0.{part}.weight", WIDE, "q4_k_m", 32) for part in others} == {"Q4_K"}


def test_rows_that_are_no_multiple_of_a_block():
    def of(kind, width, name="blk.1.attn_q.weight"):
        return tensor_type(name, (4, width), kind, 4)

    assert [of("q4_k_m", width) for width in (512, 192, 100)] == ["Q4_K", "Q5_0", "F16"]
    assert [of("q4_k_m", width, "output.weight") for width in (512, 192, 100)] == ["Q6_K", "Q8_0", "F16"]
    assert [of(kind, 100) for kind in ("q8_0", "q4_0")] == ["F16", "F16"]


def test_names():
    assert gguf_name("model.layers.12.self_attn.k_proj.bias") == "blk.12.attn_k.bias"
    assert gguf_name("lm_head.weight") == "output.weight"
