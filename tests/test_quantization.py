"""4-bit weights: the same bits as bitsandbytes makes, for the right linears, in little memory."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit

from qwenvl import QwenVLConfig, quantization
from qwenvl.quantization import (
    dequantized,
    is_quantized,
    linear_4bit,
    modules_to_skip,
    nf4_config,
    quantize,
    quantized_names,
    quantized_parts,
    read_parts,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LANGUAGE = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
VISION = ("attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


# The last piece is shorter; the last block is, too; less than a piece.
@pytest.mark.parametrize("shape", [(256, 192), (63, 310), (8, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_make_the_same_bits(monkeypatch, dtype, shape):
    monkeypatch.setattr(quantization, "PIECE", 1024)
    values = weight(*shape).to(dtype)
    codes, state = quantize(values)
    expected_codes, expected = bnb.quantize_4bit(values, compress_statistics=True, quant_type="nf4")
    assert torch.equal(codes, expected_codes)
    ours, theirs = state.as_dict(packed=True), expected.as_dict(packed=True)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(dequantized(values, dtype), bnb.dequantize_4bit(expected_codes, expected))


def test_no_piece_is_larger_than_said(monkeypatch):
    sizes = []
    original = bnb.quantize_4bit
    monkeypatch.setattr(quantization, "PIECE", 4096)
    monkeypatch.setattr(
        bnb, "quantize_4bit", lambda values, **how: sizes.append(len(values)) or original(values, **how)
    )
    quantize(weight(100, 192))
    assert sum(sizes) == 19200 and max(sizes) == 4096


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_sees_the_dequantized_weight(dtype):
    """Output and input gradient of the 4-bit linear are those of a plain one with the dequantised weight."""
    plain = torch.nn.Linear(128, 96).to(dtype)
    ours = linear_4bit(plain)
    assert isinstance(ours, Linear4bit) and is_quantized(ours) and not is_quantized(plain)
    ours.compute_dtype, ours.compute_type_is_set = dtype, True
    seen = dequantized(plain.weight.data, dtype)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for forward in (ours, lambda x: torch.nn.functional.linear(x, seen, plain.bias)):
        given = x.clone().requires_grad_()
        output = forward(given)
        output.float().square().sum().backward()
        results.append((output, given.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_the_weight_is_rounded_before_it_is_quantized():
    values = weight(64, 64)
    rounded = dequantized(values, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, dequantized(values.bfloat16(), torch.bfloat16))
    # NF4's error on normally distributed weights is 9.1% of their size.
    error = (dequantized(values, torch.float32) - values).norm() / values.norm()
    assert 0.08 < error < 0.10


@pytest.mark.parametrize("parts", [("language",), ("language", "vision"), ("language", "vision", "head")])
def test_names(tiny_folder, parts):
    expected = {f"transformer.h.{layer}.{name}.weight" for layer in range(2) for name in LANGUAGE}
    if "vision" in parts:
        blocks = "transformer.visual.transformer.resblocks"
        expected |= {f"{blocks}.{layer}.{name}.weight" for layer in range(2) for name in VISION}
    if "head" in parts:
        expected.add("lm_head.weight")
    assert quantized_names(QwenVLConfig.from_pretrained(tiny_folder), parts) == expected


def test_names_and_sizes_of_the_published_model(pytestconfig):
    layout = json.loads((pytestconfig.rootpath / "tests" / "data" / "checkpoint_layout.json").read_text())
    shapes = layout["tensors"]
    names = {part: quantized_names(QwenVLConfig(), (part,)) for part in quantization.PARTS}
    assert {part: len(found) for part, found in names.items()} == {"language": 160, "vision": 192, "head": 1}
    for found in names.values():
        assert found <= shapes.keys() and all(len(shapes[name]) == 2 for name in found)
    sizes = {part: sum(shapes[name][0] * shapes[name][1] for name in found) for part, found in names.items()}
    assert sizes == {"language": 6_476_005_376, "vision": 1_840_250_880, "head": 622_329_856}


@pytest.mark.parametrize("parts", [("language",), ("language", "head"), ("language", "vision", "head")])
def test_a_config_says_its_parts(parts):
    config = QwenVLConfig(quantization_config=nf4_config(parts).to_dict())
    assert quantized_parts(config) == parts
    assert quantized_parts(QwenVLConfig()) == ()
    assert "lm_head" not in modules_to_skip(("language", "head"))


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    ],
)
def test_another_quantization_is_refused(settings):
    with pytest.raises(ValueError, match=rf"{settings['quant_method']}, which is not NF4 .* 16-bit"):
        quantized_parts(QwenVLConfig(quantization_config=settings))


def test_parts_are_read():
    assert read_parts(["head", "language"]) == ("language", "head")
    assert read_parts("language") == ("language",)
    with pytest.raises(ValueError, match="'resampler' is none of language, vision, head"):
        read_parts(["language", "resampler"])
    with pytest.raises(ValueError, match="add 'language'"):
        read_parts(["head"])
