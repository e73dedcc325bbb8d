import json

import pytest
import torch
from peft import PeftModel

from finetune.errors import UserError
from finetune.model.adapters import put_lora
from finetune.model.components import count_parameters
from finetune.recipe import Adapter, Freeze
from qwenvl import load_model


def lora_modules(model) -> dict[str, tuple[int, float]]:
    """Rank and scale of each layer with LoRA."""
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def test_layers_by_number_are_the_language_models(tiny_model):
    adapter = Adapter(r=4, targets=("c_attn", "w2"), vision_targets=("in_proj",), layers_to_transform=(1,))
    modules = set(lora_modules(put_lora(tiny_model, adapter, Freeze(), embeddings=False)))
    assert {name for name in modules if ".h." in name} == {"transformer.h.1.attn.c_attn", "transformer.h.1.mlp.w2"}
    assert {name for name in modules if ".h." not in name} == {
        f"transformer.visual.transformer.resblocks.{number}.attn.in_proj" for number in (0, 1)
    }


def test_a_saved_adapter_has_no_layer_numbers(tiny_model, tmp_path):
    """Programs read them in different ways."""
    model = put_lora(tiny_model, Adapter(targets=("w1",), layers_to_transform=(1,)), Freeze(), embeddings=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["transformer.h.1.mlp.w1"] and config["layers_to_transform"] is None


def test_ranks_and_alphas_by_pattern(tiny_model):
    adapter = Adapter(r=4, alpha=8, rank_pattern={"w1": 2, r"h\.1\..*w2": 8}, alpha_pattern={"attn.c_proj": 24})
    modules = lora_modules(put_lora(tiny_model, adapter, Freeze(), embeddings=False))
    assert modules["transformer.h.0.mlp.w1"] == (2, 4.0)
    assert modules["transformer.h.0.mlp.w2"] == (4, 2.0) and modules["transformer.h.1.mlp.w2"] == (8, 1.0)
    assert modules["transformer.h.1.attn.c_proj"] == (4, 6.0) and modules["transformer.h.1.attn.c_attn"] == (4, 2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rank_pattern": {"w3": 2}},
            r"rank_pattern: 'w3' matches none of the layers with LoRA. There are: attn.c",
        ),
        ({"alpha_pattern": {"in_proj": 2}}, r"alpha_pattern: 'in_proj' matches none"),
        ({"rank_pattern": {"w1": 2, "mlp.w1": 4}}, r"h.0.mlp.w1 is matched by 'w1' and by 'mlp.w1'"),
        (
            {"layers_to_transform": (1, 2)},
            r"transform: there is no layer 2: the language model's are 0 to 1",
        ),
        (
            {"targets": ("w1", "h.0.attn.c_attn"), "layers_to_transform": (1,)},
            r"'h.0.attn.c_attn' is in none of the",
        ),
        ({"targets": ("w1",), "bias": "lora_only"}, r"bias: lora_only, but none of the layers with LoRA has a bias"),
        (
            {"init": "orthogonal", "rank_pattern": {"w1": 3}},
            r"needs an even adapter.rank_pattern.w1, not 3",
        ),
    ],
)
def test_what_says_nothing_is_refused(tiny_model, settings, message):
    with pytest.raises(UserError, match=message):
        put_lora(tiny_model, Adapter(r=4, **settings), Freeze(), embeddings=False)


@pytest.mark.parametrize(
    ("bias", "dtype", "loading"),
    [
        ("lora_only", "bfloat16", {}),
        ("all", "bfloat16", {}),
        ("all", "float32", {}),
        ("lora_only", "bfloat16", {"quantization": "nf4"}),
    ],
)
def test_biases_are_trained_in_float32(tiny_folder, expected, tmp_path, bias, dtype, loading):
    model = load_model(tiny_folder, dtype=dtype, device_map="cpu" if loading else None, **loading)
    adapted = put_lora(model, Adapter(r=4, bias=bias), Freeze(), embeddings=False)
    biases = {name: p for name, p in adapted.named_parameters() if p.requires_grad and ".lora_" not in name}
    there = [name for name, _ in adapted.named_parameters() if name.endswith(".bias")]
    assert set(biases) == {name for name in there if bias == "all" or "c_attn" in name} and biases
    assert all(p.dtype == torch.float32 for p in biases.values())
    inputs = {"input_ids": expected["one_image.input_ids"][None], "pixel_values": expected["pixel_values"][:1]}
    adapted.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in biases.values())
    without = [name for name, p in biases.items() if not p.grad.abs().sum()]
    assert not without
    # The forward leaves the float32 values as they are, though the weights are in 16 bits.
    with torch.no_grad():
        for p in biases.values():
            p += 1e-4 * torch.randn_like(p)
        moved = {name: p.detach().clone() for name, p in biases.items()}
        logits = adapted.eval()(**inputs).logits
    assert all(torch.equal(p, moved[name]) for name, p in adapted.named_parameters() if name in moved)
    adapted.save_pretrained(tmp_path)
    again = load_model(tmp_path, dtype=dtype, device_map="cpu" if loading else None, **loading)
    assert isinstance(again, PeftModel)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, logits)


def test_biases_are_counted(tiny_model):
    counts = count_parameters(put_lora(tiny_model, Adapter(bias="lora_only"), Freeze(), embeddings=False))
    assert counts["language"].trained == sum(
        p.numel() for name, p in tiny_model.named_parameters() if name.endswith("c_attn.base_layer.bias")
    )
    assert counts["vision"].trained == 0
