"""Export in 4 bits: the bits that loading makes, a folder that is complete, or no folder at all."""

import json
import shutil

import pytest
import torch
from recipes_for_tests import TINY, write_recipe
from safetensors.torch import load_file, save_file

from finetune.cli import main
from finetune.errors import Failed, UserError
from finetune.export import nf4 as module
from finetune.export.nf4 import export_nf4, stored_bytes
from finetune.files.disk_space import NotEnoughDiskSpace
from finetune.recipe import load_recipe
from finetune.terminal import labelled
from finetune.training.train import train
from qwenvl import load_model, load_processor
from qwenvl.base_check import check_base, identify_base
from qwenvl.checkpoint.fingerprint import weights_fingerprint
from qwenvl.checkpoint.record import BaseNote, ModelRecord, read_record


def export(to, **settings):
    said = []
    export_nf4(str(TINY), to, say=lambda *line: said.append(labelled(*line)), **settings)
    return said


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("parts", [("language",), ("language", "vision", "head")])
def test_the_folder_is_what_loading_makes(tmp_path, parts, dtype):
    said = export(tmp_path / "small", quantize=parts, dtype=dtype)
    ours = load_model(tmp_path / "small").state_dict()
    theirs = load_model(TINY, quantization="nf4", quantize=parts, dtype=dtype).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert any(", ".join(parts) in line for line in said)
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    estimate = stored_bytes(str(TINY), parts, getattr(torch, dtype) if dtype else None)
    assert size <= estimate <= 1.05 * size


def test_the_folder_is_complete(tmp_path):
    export(tmp_path / "small")
    folder = tmp_path / "small"
    assert (folder / "qwen.tiktoken").read_bytes() == (TINY / "qwen.tiktoken").read_bytes()
    assert (folder / "generation_config.json").read_bytes() == (TINY / "generation_config.json").read_bytes()
    published, config = (json.loads((path / "config.json").read_text()) for path in (TINY, folder))
    assert config.pop("quantization_config")["bnb_4bit_quant_type"] == "nf4"
    assert config == published
    assert load_processor(folder).n_queries == 256
    card = (folder / "README.md").read_text()
    assert "in 4 bits" in card and weights_fingerprint(TINY) in card
    assert read_record(folder) == ModelRecord(
        base=BaseNote(str(TINY), identify_base(TINY)),
        own_weights=weights_fingerprint(folder),
        quantize=("language",),
        chat_format="chatml",
        read_from="qwenvl.json",
    )
    # An adapter trained on the folder fits the 16-bit checkpoint, to be merged there.
    assert identify_base(folder) == identify_base(TINY)


def test_an_adapter_trained_on_the_folder_belongs_to_the_checkpoint(tmp_path):
    """Folder and checkpoint, the latter quantised while loading, train to the same adapter, to be merged there."""
    export(tmp_path / "small")
    adapters = []
    for name, path in (("folder", tmp_path / "small"), ("checkpoint", TINY)):
        recipe = write_recipe(tmp_path / name, model__quantization="nf4", model__path=str(path), train__max_steps=1)
        adapters.append(train(load_recipe(recipe), say=lambda *_: None) / "adapter")
    tensors = [(folder / "adapter_model.safetensors").read_bytes() for folder in adapters]
    assert tensors[0] == tensors[1]
    assert check_base(adapters[0], TINY) and check_base(adapters[1], tmp_path / "small")
    load_model(TINY, adapter=adapters[0])


def test_a_folder_whose_weights_were_changed_is_not_the_base(tmp_path):
    export(tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    tensors = load_file(file)
    codes = tensors["transformer.h.1.mlp.w2.weight"]
    codes[len(codes) // 3] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert identify_base(tmp_path / "small").weights == weights_fingerprint(tmp_path / "small")


def test_what_was_read_back_is_compared(tmp_path, monkeypatch):
    original = module.write_tensors

    def flip(folder, plan, tensors):
        original(folder, plan, tensors)
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(module, "write_tensors", flip)
    with pytest.raises(Failed, match=r"1 of .* tensors are not what was written"):
        export(tmp_path / "small")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["write_tensors", "copy_companions", "write_record", "write_card"])
def test_a_failing_disk_leaves_nothing(tmp_path, monkeypatch, broken):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, broken, fail)
    with pytest.raises(Failed, match="No space"):
        export(tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_wrong_input_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export(tmp_path / "there")
    with pytest.raises(ValueError, match="'everything' is none of"):
        export(tmp_path / "small", quantize=["language", "everything"])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(TINY)})
    )
    with pytest.raises(UserError, match="is an adapter: merge it"):
        export_nf4(str(tmp_path / "adapter"), tmp_path / "small")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(NotEnoughDiskSpace, match=r"1\.0 kB are free"):
        export(tmp_path / "small")


def test_the_command_takes_the_parts(tmp_path, capsys):
    arguments = ["export", str(TINY), "--out", str(tmp_path / "small")]
    assert main([*arguments, "--to", "nf4", "--quantize", "language,head"]) == 0
    model = load_model(tmp_path / "small")
    assert not model.lm_head.weight.is_floating_point()
    assert model.transformer.visual.transformer.resblocks[0].mlp.c_fc.weight.is_floating_point()
    assert main([*arguments[:2], "--out", str(tmp_path / "other"), "--to", "qwen2", "--quantize", "language"]) == 2
    assert "--quantize has no effect with --to qwen2" in capsys.readouterr().err


def test_a_4_bit_folder_is_not_exported_again(tmp_path):
    export(tmp_path / "small")
    with pytest.raises(UserError, match="in 4 bits already: language"):
        export_nf4(str(tmp_path / "small"), tmp_path / "smaller")
