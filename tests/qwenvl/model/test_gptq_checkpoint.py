"""A checkpoint packed by GPTQ is loaded as the model of its 16-bit weights, or refused by name."""

import json
import shutil
import weakref

import pytest
import torch
from gptq_for_tests import change_config, change_tensors, write_int4
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwenvl import InputError, QwenVLForConditionalGeneration, load_model
from qwenvl.checkpoint import gptq
from qwenvl.model import gptq_checkpoint


def assert_same(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "float32", "embeddings_on_cpu": True},
        {"quantization": "nf4"},
        {"quantization": "nf4", "quantize": ["language", "vision", "head"], "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_the_model_is_that_of_the_unpacked_weights(int4, plain, settings):
    ours, theirs = load_model(int4, **settings), load_model(plain, **settings)
    assert type(ours) is QwenVLForConditionalGeneration and not ours.training
    assert_same(ours, theirs)
    assert ours.dtype == theirs.dtype == getattr(torch, settings.get("dtype", "float16"))
    assert ours.config.to_dict() | {"_name_or_path": ""} == theirs.config.to_dict() | {"_name_or_path": ""}
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.name_or_path == ours.config.name_or_path == str(int4)


def test_logits_are_those_of_the_unpacked_weights(int4, plain, tiny_processor, tiny_images):
    content = [{"type": "image", "image": str(tiny_images[0])}, {"type": "text", "text": "What is this?"}]
    inputs = tiny_processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        logits = [load_model(folder, dtype="float32")(**inputs).logits for folder in (int4, plain)]
    assert torch.equal(*logits)


def test_what_is_saved_is_an_ordinary_checkpoint(int4, plain, tmp_path):
    load_model(int4).save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert_same(load_model(tmp_path / "saved"), load_model(plain))


def test_the_auto_class_and_a_given_config(int4, plain, monkeypatch):
    assert_same(AutoModelForCausalLM.from_pretrained(int4), load_model(plain))
    model, report = AutoModelForCausalLM.from_pretrained(int4, dtype="bfloat16", output_loading_info=True)
    assert_same(model, load_model(plain, dtype="bfloat16"))
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_a_config_without_a_type_takes_that_of_the_scales(tmp_path):
    int4 = write_int4(tmp_path)
    change_config(int4, torch_dtype=None, fp16=None)
    assert load_model(int4).dtype == torch.float16


def test_settings_of_autogptq_alone(int4, plain, tmp_path):
    folder = shutil.copytree(int4, tmp_path / "int4")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    change_config(folder, quantization_config=None)
    assert_same(load_model(folder), load_model(plain))
    (folder / "quantize_config.json").unlink()
    with pytest.raises(InputError, match=r"packed, but config\.json has no quantization_config|is missing from"):
        load_model(folder)


def test_shards(int4, plain, tmp_path):
    """The published folder has several files, and parts of one linear may be in two of them."""
    folder = shutil.copytree(int4, tmp_path / "int4")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = {f"model-0000{n + 1}-of-00002.safetensors": sorted(tensors)[n::2] for n in range(2)}
    for file, names in halves.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in halves.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(load_model(folder), load_model(plain))


def test_weights_are_unpacked_one_after_the_other(int4, monkeypatch):
    """While they are quantised to NF4, none is kept in 16 bits until the one after the next is read."""
    read, most = [], 0
    right = gptq.DequantizedTensor.read

    def watched(self, *arguments):
        nonlocal most
        weight = right(self, *arguments)
        read.append(weakref.ref(weight))
        most = max(most, sum(each() is not None for each in read))
        return weight

    monkeypatch.setattr(gptq.DequantizedTensor, "read", watched)
    load_model(int4, quantization="nf4")
    assert len(read) == 10 and most <= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, r"int4: quantization_config: GPTQ with bits: 3, but only GPTQ of 4 bits"),
        ({"quant_method": "awq"}, "quantised by awq, which is neither NF4 of bitsandbytes nor GPTQ"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    ],
)
def test_other_quantisations_are_refused(tmp_path, settings, message):
    folder = write_int4(tmp_path, **settings)
    with pytest.raises(InputError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": None}, r"model\.safetensors: transformer\.h\.0\.mlp\.w1\.scales is missing"),
        ({"g_idx": torch.full((256,), 9, dtype=torch.int32)}, r"w1\.g_idx names groups other than"),
        (
            dict.fromkeys(("qweight", "qzeros", "scales", "g_idx")),
            r"w1\.weight is missing from its weights, though",
        ),
    ],
)
def test_damaged_weights_are_named(tmp_path, changes, message):
    folder = write_int4(tmp_path)
    change_tensors(folder, **changes)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_weights_of_another_width_are_named(tmp_path):
    folder = write_int4(tmp_path)
    change_config(folder, intermediate_size=640)
    with pytest.raises(InputError, match=r"mlp\.\w+\.weight has shape \(256, 256\), but config\.json asks for"):
        load_model(folder)


def test_ordinary_weights_under_such_a_config_are_refused(plain, int4, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "mixed")
    shutil.copy(int4 / "config.json", folder)
    with pytest.raises(InputError, match="packed by GPTQ, but they are not: remove quantization_config"):
        load_model(folder)


def test_what_transformers_would_ignore_is_refused(int4, monkeypatch):
    with pytest.raises(InputError, match="cannot be loaded with revision: download it"):
        QwenVLForConditionalGeneration.from_pretrained(int4, revision="v1.0")
    monkeypatch.setattr(gptq_checkpoint, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(InputError, match="ZeRO-3 cannot load a checkpoint packed by GPTQ: unpack it first"):
        load_model(int4)


def test_a_missing_weight_of_an_ordinary_checkpoint_is_named(plain, tmp_path):
    """Transformers draws it at random, and warns."""
    folder = shutil.copytree(plain, tmp_path / "short")
    change_tensors(folder, weight=None)
    with pytest.raises(InputError, match=r"h\.0\.mlp\.w1\.weight is missing from its weights"):
        load_model(folder)
