"""Which linears are in 4 bits: by part, by configuration, and of the published model."""

import json

import pytest

from qwenvl import InputError, QwenVLConfig
from qwenvl.model.quantization import PARTS, modules_to_skip, nf4_config, quantized_names, quantized_parts, read_parts

LANGUAGE = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
VISION = ("attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")


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
    names = {part: quantized_names(QwenVLConfig(), (part,)) for part in PARTS}
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
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    ],
)
def test_another_quantization_is_refused(settings):
    with pytest.raises(InputError, match=rf"{settings['quant_method']}, which is neither NF4 .* 16-bit"):
        quantized_parts(QwenVLConfig(quantization_config=settings))


def test_gptq_is_read_in_16_bits():
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert quantized_parts(QwenVLConfig(quantization_config=settings)) == ()
    with pytest.raises(InputError, match="folder: quantization_config: GPTQ with bits: 3"):
        quantized_parts(QwenVLConfig(quantization_config=settings | {"bits": 3}), "folder")


def test_parts_are_read():
    assert read_parts(["head", "language"]) == ("language", "head")
    assert read_parts("language") == ("language",)
    with pytest.raises(InputError, match="'resampler' is none of language, vision, head"):
        read_parts(["language", "resampler"])
    with pytest.raises(InputError, match="add 'language'"):
        read_parts(["head"])
