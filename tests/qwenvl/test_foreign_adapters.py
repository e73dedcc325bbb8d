"""Adapters of other programs and of older versions: loaded right, or refused for the true reason."""

import json
import shutil

import pytest
import torch
from adapters_for_tests import KINDS, TINY, edit_config, make_adapter
from safetensors.torch import load_file, save_file

from qwenvl import InputError, QwenVLForConditionalGeneration, load_model

WEIGHTS = "adapter_model.safetensors"
IDS = torch.arange(3, 43)[None]
# What ms-swift of early 2024 wrote beside PEFT's keys, with its regular expression of targets.
SWIFT = {
    "lora_dtype": "fp32",
    "lorap_lr_ratio": 16.0,
    "lorap_emb_lr": 1e-06,
    "revision": "master",
    "target_modules": r"^(transformer.h)(?!.*(lm_head|output|emb|wte|shared|mlp.c_proj|ln_)).*"
    "(c_attn|attn.c_proj|w1|w2)$",
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_ms_swift_of_2024(tmp_path, recwarn):
    model = make_adapter(tmp_path, own=False)
    edit_config(tmp_path, **SWIFT)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))
    assert not [warning for warning in recwarn if "lorap_lr_ratio" in str(warning.message)]


@pytest.mark.parametrize("kind", ["pissa", "olora", "orthogonal", "rslora", "dora", "patterns"])
def test_adapters_that_change_or_keep_the_base_are_what_was_trained(tmp_path, kind):
    model = make_adapter(tmp_path, **KINDS[kind])
    assert (logits(load_model(tmp_path)) - logits(model)).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "random numbers, which cannot be computed again"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "cannot be computed again"),
        ({"init_lora_weights": "corda"}, "cannot be computed again"),
        ({"invented_in_2030": 3}, "invented_in_2030 is 3, which the installed PEFT does not know"),
        ({"modules_to_save": ["wte", "lm_head"]}, "wte and lm_head were trained in full"),
        ({"r": 0}, "r is 0 instead of a positive whole number"),
    ],
)
def test_what_cannot_be_loaded_right_is_refused_before_the_base_is_read(tmp_path, monkeypatch, changes, told):
    make_adapter(tmp_path, own=False)
    edit_config(tmp_path, **changes)
    monkeypatch.delattr(QwenVLForConditionalGeneration, "from_pretrained")
    with pytest.raises(InputError, match=told):
        load_model(tmp_path)


def test_the_published_scripts_root_names_its_checkpoint(tmp_path):
    root, complete = tmp_path / "output_qwen", tmp_path / "output_qwen" / "checkpoint-1000"
    model = make_adapter(complete, own=False, modules_to_save=["wte", "lm_head"])
    shutil.copy(complete / "adapter_config.json", root)
    lora = {name: value for name, value in load_file(complete / WEIGHTS).items() if ".lora_" in name}
    save_file(lora, root / WEIGHTS)
    with pytest.raises(InputError, match=r"Use .*output_qwen/checkpoint-1000, which has them"):
        load_model(root)
    assert torch.equal(logits(load_model(complete)), logits(model))


@pytest.mark.parametrize("end", [".modules_to_save.default", ".modules_to_save"])
def test_names_of_modules_in_memory_are_understood(tmp_path, end):
    """As a state of the whole model has them, cut down to what was trained."""
    model = make_adapter(tmp_path, own=False, modules_to_save=["wte", "lm_head"])
    weights = load_file(tmp_path / WEIGHTS)
    renamed = {
        name.replace(".weight", ".default.weight")
        if ".lora_" in name
        else name.replace(".weight", f"{end}.weight"): value
        for name, value in weights.items()
    }
    assert not renamed.keys() & weights.keys()
    save_file(renamed, tmp_path / WEIGHTS)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


def test_a_base_that_moved_with_the_run_is_found_by_the_path_of_the_training(tmp_path, monkeypatch):
    shutil.copytree(TINY, tmp_path / "here" / "base")
    model = make_adapter(tmp_path / "here" / "adapter", base=tmp_path / "here" / "base")
    noted = tmp_path / "here" / "adapter" / "qwenvl.json"
    record = json.loads(noted.read_text())
    noted.write_text(json.dumps(record | {"base": record["base"] | {"path": "base"}}))
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    assert torch.equal(logits(load_model("adapter")), logits(model))
