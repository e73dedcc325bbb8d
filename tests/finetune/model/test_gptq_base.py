"""The way of a job on a base packed by GPTQ (Qwen-VL-Chat-Int4): check, train, chat, evaluate, merge, export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters_for_tests import make_adapter
from gptq_for_tests import change_tensors, write_int4
from peft import PeftModel
from recipes_for_tests import IMAGES, ROOT, finetune, write_recipe
from safetensors.torch import load_file

from finetune.bench.subject import find_subject
from finetune.export.export import export
from finetune.memory.weights import model_of_shapes, weight_bytes
from finetune.merge.merge import merge
from finetune.recipe import load_recipe
from finetune.terminal import labelled
from qwenvl import QwenVLConfig, load_model


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, int4):
    folder = tmp_path_factory.mktemp("run")
    return write_recipe(folder, model__path=str(int4), train__max_steps=2, train__save_steps=2)


@pytest.fixture(scope="module")
def trained(recipe):
    """The run folder, and what was said."""
    said = finetune(recipe).stdout
    return recipe.parent / "run", said


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def quietly(function, *arguments, **settings) -> str:
    lines: list[str] = []
    function(*arguments, say=lambda *said: lines.append(labelled(*said)), **settings)
    return "\n".join(lines)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_a_check_says_what_it_is_and_plans_its_memory(recipe, int4, plain):
    said = finetune("check", recipe).stdout
    assert "packed by GPTQ in 4 bits; its weights are read as 16-bit ones, and take the memory of" in said
    assert "memory" in said and "fits a GPU of" in said
    loaded = load_recipe(recipe)
    for quantization in ("none", "nf4"):
        model = loaded.model.model_copy(update={"quantization": quantization})
        changed = loaded.model_copy(update={"model": model})
        configs = [QwenVLConfig.from_pretrained(base) for base in (int4, plain)]
        packed, unpacked = (weight_bytes(model_of_shapes(changed, config, "cuda")) for config in configs)
        assert packed == unpacked and (packed.staged > 0) == (quantization == "nf4")


def test_training_starts_from_the_unpacked_weights(trained, recipe, plain):
    run, said = trained
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    finetune(recipe, f"model.path={plain}", f"output={run.parent / 'plain'}")
    there = json.loads((run.parent / "plain" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert first == there
    assert "note        The checkpoint is packed by GPTQ" in said
    named = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == load_recipe(recipe).model.path


def test_chat_and_evaluation(trained, int4, tmp_path):
    run, _ = trained
    chat = ["--image", IMAGES[0], "--once", "What is this?", "--max-new-tokens", "4"]
    assert finetune("chat", run, *chat).stdout.strip()
    question = {"questionId": 1, "image": str(IMAGES[0]), "question": "What?", "answers": ["a"]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    evaluate = ["--task", "docvqa", "--data", tmp_path / "questions.jsonl", "--images-root", ROOT]
    done = finetune("evaluate", int4, *evaluate, "--max-new-tokens", "4", "--out", tmp_path / "out")
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 1, done.stdout


def test_an_adapter_is_merged_into_the_unpacked_weights(trained, int4, plain, tmp_path):
    run, _ = trained
    said = quietly(merge, run, tmp_path / "merged", check=False)
    assert "is packed by GPTQ in 4 bits: the adapter is merged into the 16-bit weights that these stand for" in said
    merged, adapted = weights_of(tmp_path / "merged"), load_model(run, dtype="float32")
    assert isinstance(adapted, PeftModel)
    for name, tensor in adapted.merge_and_unload().state_dict().items():
        assert merged[name].dtype == torch.float16
        assert torch.equal(merged[name], tensor.half()) or torch.allclose(merged[name].float(), tensor, rtol=2**-10)
    assert "quantization_config" not in config_of(tmp_path / "merged")
    assert config_of(tmp_path / "merged")["torch_dtype"] == "float16"
    load_model(tmp_path / "merged")
    # The same adapter on the same weights, unpacked.
    quietly(merge, run, tmp_path / "again", base=str(plain), check=False)
    again = weights_of(tmp_path / "again")
    assert again.keys() == merged.keys() and all(torch.equal(again[name], merged[name]) for name in merged)


@pytest.mark.slow
def test_a_merge_is_checked_against_base_and_adapter(trained, tmp_path):
    said = quietly(merge, trained[0], tmp_path / "merged")
    assert "12 tensors computed once more" in said and "from base with adapter" in said


def test_an_adapter_of_the_published_script_says_into_what_it_is_merged(int4, tmp_path):
    make_adapter(tmp_path / "adapter", base=int4, own=False)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "Qwen/Qwen-VL-Chat-Int4"}))
    said = quietly(merge, tmp_path / "adapter", tmp_path / "a", base=str(int4), check=False)
    assert "it names Qwen/Qwen-VL-Chat-Int4" in said and f"{int4} is packed by GPTQ in 4 bits" in said
    tiny = ROOT / "examples" / "tiny"
    said = quietly(merge, tmp_path / "adapter", tmp_path / "b", base=str(tiny), check=False)
    assert f"By its name the base in training was in 4 bits (GPTQ), and {tiny} is not" in said
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    moved, name = load_file(tiny / "model.safetensors"), "transformer.h.0.mlp.w1.weight"
    assert not torch.equal(a[name].float(), b[name]) and not torch.equal(b[name], moved[name])


@pytest.mark.parametrize("to", ["safetensors", "nf4", "qwen2"])
def test_exports_are_those_of_the_unpacked_weights(int4, plain, tmp_path, to):
    said = quietly(export, str(int4), to, out=tmp_path / "ours")
    quietly(export, str(plain), to, out=tmp_path / "theirs")
    ours, theirs = weights_of(tmp_path / "ours"), weights_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")
    assert ("quantization_config" in config_of(tmp_path / "ours")) == (to == "nf4")
    if to != "nf4":
        assert "unpacked from GPTQ's 4 bits" in said


def test_an_export_says_the_type_that_was_written(int4, tmp_path):
    """Even if the config has another one, which is not that of the scales."""
    folder = shutil.copytree(int4, tmp_path / "int4")
    config = config_of(folder)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16", "bf16": True, "fp16": False}))
    quietly(export, str(folder), "safetensors", out=tmp_path / "out")
    written = config_of(tmp_path / "out")
    assert (written["torch_dtype"], written["fp16"], written["bf16"]) == ("float16", True, False)


def test_all_of_it_is_trained_and_saved_in_16_bits(int4, tmp_path):
    changes = {"adapter": None, "freeze__language": False, "train__learning_rate": 1e-4}
    recipe = write_recipe(tmp_path, model__path=str(int4), train__max_steps=1, train__save_steps=1, **changes)
    finetune(recipe)
    assert "quantization_config" not in config_of(tmp_path / "run" / "model")
    load_model(tmp_path / "run")


def test_the_bench_takes_its_sizes(recipe, int4):
    subject = find_subject(load_recipe(recipe), "recipe")
    assert getattr(subject.config, "quantization_config", None) is None and subject.stored_dtype == torch.float16


@pytest.mark.parametrize("command", ["train", "chat", "export"])
def test_damaged_weights_end_in_one_sentence(command, tmp_path):
    folder = write_int4(tmp_path)
    change_tensors(folder, scales=None)
    recipe = write_recipe(tmp_path, model__path=str(folder), train__max_steps=1)
    arguments = {
        "train": [recipe],
        "chat": ["chat", folder, "--once", "hi"],
        "export": ["export", folder, "--to", "safetensors", "--out", tmp_path / "out"],
    }[command]
    done = finetune(*arguments, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "transformer.h.0.mlp.w1.scales is missing" in done.stderr and "Traceback" not in done.stderr
