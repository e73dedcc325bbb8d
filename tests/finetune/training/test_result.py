"""What a run leaves, opened by other programs."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from recipes_for_tests import ROOT, TINY, write_recipe

from finetune.recipe import load_recipe
from finetune.run.checkpoints import verify
from finetune.terminal import say_nothing
from finetune.training.train import train
from qwenvl import load_model

# The fields of LoraConfig in PEFT 0.7.1: its src/peft/config.py and src/peft/tuners/lora/config.py.
PEFT_0_7_1 = {
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_type", "task_type", "inference_mode"),
    *("r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("megatron_config", "megatron_core", "loftq_config"),
}
PUBLISHED_CODE = {"modeling_qwen.py": "raise SystemExit('this must never run')", "SimSun.ttf": "a font"}


@pytest.fixture
def base(tmp_path):
    """The tiny checkpoint as a published base: its code beside it, in bfloat16's words, asked as raw text."""
    folder = tmp_path / "base"
    shutil.copytree(TINY, folder)
    for name, text in PUBLISHED_CODE.items():
        (folder / name).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    flags = {"torch_dtype": "bfloat16", "bf16": True, "fp32": False}
    (folder / "config.json").write_text(json.dumps(config | flags))
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"chat_format": "raw"}))
    return folder


def run(folder, *overrides, **changes):
    changes = {"train__max_steps": 2, "evaluate": None, **changes}
    return train(load_recipe(write_recipe(folder, **changes), list(overrides)), say=say_nothing)


def test_an_adapter_opens_in_peft_of_every_version_and_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    finished = run(tmp_path, "model.path=examples/tiny", adapter__init="orthogonal", adapter__rslora=False)
    folders = [finished / "adapter", finished / "checkpoints" / "step-2"]
    for folder in folders:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config.keys() == PEFT_0_7_1
        assert config["init_lora_weights"] is True  # the start of a training, which 0.7 does not know by name
        assert config["base_model_name_or_path"] == str(TINY)
        verify(folder)  # written before the manifest
    monkeypatch.chdir(tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(finished / "adapter").eval()
    assert model.generation_config.eos_token_id == [514, 513, 512]
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, load_model(finished)(input_ids=ids).logits)


def test_a_model_trained_in_full_opens_with_the_published_code(tmp_path, base):
    changes = {"adapter": None, "freeze": {"language": False}, "model__dtype": "float32"}
    finished = run(tmp_path, f"model.path={base}", **changes)
    model = finished / "model"
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, model))
    for key in ("architectures", "auto_map", "tokenizer_type", "visual"):
        assert after[key] == before[key]
    # Both names of the type, and the flags by which the published code chooses it.
    assert (after["torch_dtype"], after["dtype"], after["bf16"], after["fp32"]) == ("float32", "float32", False, True)
    for name in (*PUBLISHED_CODE, "tokenizer_config.json", "qwen.tiktoken"):
        assert (model / name).read_bytes() == (base / name).read_bytes()
    for folder in (model, finished / "checkpoints" / "step-2"):
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 512
        verify(folder)
    # It was trained as chats, whatever the base was.
    assert json.loads((model / "generation_config.json").read_text())["chat_format"] == "chatml"
    assert load_model(finished).generation_config.eos_token_id == [514, 513, 512]
