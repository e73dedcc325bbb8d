"""Pickles that run code, under every name a loader might open: none runs, and the error is one for the user."""

import json
import pickle
import shutil

import pytest
import torch

from finetune.export.export import export
from finetune.merge.merge import merge
from finetune.terminal import say_nothing
from qwenvl import InputError, load_model, load_processor
from qwenvl.checkpoint.fingerprint import weights_fingerprint


class Payload:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "ran"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(tiny_folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    return copy


def write_payload(file, mark, form):
    if form == "torch":
        torch.save({"transformer.wte.weight": Payload(mark)}, file)
    else:
        file.write_bytes(pickle.dumps({"transformer.wte.weight": Payload(mark)}))


@pytest.mark.parametrize("form", ["torch", "pickle"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "pytorch_model-00001-of-00001.bin"])
def test_weights_that_run_code(folder, mark, name, form):
    write_payload(folder / name, mark, form)
    if "00001" in name:
        index = {"metadata": {}, "weight_map": {"transformer.wte.weight": name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for read in (load_model, weights_fingerprint, export_safetensors, export_nf4, export_qwen2):
        with pytest.raises(InputError, match=r"cannot be read|cannot be loaded|damaged"):
            read(folder)
    assert not mark.exists()
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def export_safetensors(folder):
    export(str(folder), "safetensors", out=folder.parent / "out", say=say_nothing)


def export_nf4(folder):
    export(str(folder), "nf4", out=folder.parent / "out", say=say_nothing)


def export_qwen2(folder):
    export(str(folder), "qwen2", out=folder.parent / "out", say=say_nothing)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_adapters_that_run_code(tiny_folder, tmp_path, mark, form):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["c_attn"],
        "base_model_name_or_path": str(tiny_folder),
        "task_type": "CAUSAL_LM",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    write_payload(adapter / "adapter_model.bin", mark, form)
    for read in (load_model, merge_adapter):
        with pytest.raises(InputError, match="adapter"):
            read(adapter)
    assert not mark.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def merge_adapter(folder):
    merge(folder, folder.parent / "out", say=say_nothing)


def test_other_pickles_in_the_folder_are_not_opened(tiny_folder, tmp_path, mark):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_folder, folder)
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "tokenizer.pkl", "qwen.pkl", "config.pkl"):
        write_payload(folder / name, mark, "torch")
    load_model(folder)
    load_processor(folder)
    weights_fingerprint(folder)
    assert not mark.exists()


def test_a_code_folder_for_generate_is_not_run(tiny_folder, tmp_path, mark, expected):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_folder, folder)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(mark)!r}, 'w')\ndef generate(**_): return 1\n")
    load_model(folder).generate(expected["text_only.input_ids"][None], max_new_tokens=1)
    assert not mark.exists()
