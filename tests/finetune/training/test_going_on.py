"""Runs that go on from the adapter of another run."""

import json
import shutil

import pytest
import torch
from recipes_for_tests import finetune, write_recipe
from safetensors.torch import load_file

from finetune.errors import MissingFileError, UserError
from finetune.model.base import find_base
from finetune.recipe import load_recipe
from finetune.run.checkpoints import checkpoint_path
from finetune.run.folder import RunFolder
from finetune.training.going_on import settle_given_adapter


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a finished run, and a copy of its adapter."""
    folder = tmp_path_factory.mktemp("first")
    patterns = {"rank_pattern": {"w1": 2}, "alpha_pattern": {"w2": 24}, "layers_to_transform": [1]}
    adapter = {"r": 4, "dropout": 0.1, "bias": "lora_only", "vision_targets": ["in_proj"], **patterns}
    finetune(write_recipe(folder, adapter=adapter, train__max_steps=2, train__loraplus_lr_ratio=4))
    return folder / "run"


def test_a_run_goes_on_from_a_run_and_resumes_without_it(first, tmp_path):
    """Its folder may be gone then; the result is bit for bit that of a run which was not interrupted."""
    copy = tmp_path / "first"
    shutil.copytree(first, copy)
    recipe = write_recipe(tmp_path, adapter={"from": str(copy)}, train__max_steps=3, train__save_steps=1)
    said = finetune(recipe).stdout
    assert f"begins with the weights of {copy / 'adapter'}, in float32; the optimizer and the" in said
    straight = weights(tmp_path / "run" / "adapter")
    assert straight.keys() == weights(first / "adapter").keys()
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert identity["recipe"]["adapter"]["rank_pattern"] == {"w1": 2} and identity["recipe"]["adapter"]["r"] == 4
    # As a kill after step 2 leaves it.
    shutil.rmtree(checkpoint_path(tmp_path / "run" / "checkpoints", 3))
    shutil.rmtree(tmp_path / "run" / "adapter")
    run = json.loads((tmp_path / "run" / "run.json").read_text()) | {"status": "running"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    shutil.rmtree(copy)
    said = finetune(recipe).stdout
    assert "resume      from step 2" in said and "begins with" not in said
    resumed = weights(tmp_path / "run" / "adapter")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    done = finetune(recipe, "adapter.r=8", check=False)
    assert done.returncode == 2 and "recipe.adapter.r: 4 -> 8" in done.stderr
    # The same folder with another adapter is another run.
    shutil.copytree(first, copy)
    shutil.copytree(tmp_path / "run" / "adapter", copy / "adapter", dirs_exist_ok=True)
    done = finetune(recipe, check=False)
    assert done.returncode == 2 and "adapter_from: " in done.stderr


def test_a_check_says_all_of_it_before_weights_are_loaded(first, tmp_path):
    recipe = write_recipe(tmp_path, adapter={"from": str(first)})
    said = finetune("check", recipe, "--samples", "0", "data.grounding=true").stdout
    assert f"adapter     goes on from {first / 'adapter'}" in said
    assert "The adapter was trained with another setting: markup as tokens (data.grounding): false, now true." in said
    done = finetune("check", recipe, "adapter.alpha=3", "--samples", "0", check=False)
    assert done.returncode == 2 and "adapter.alpha: 3 disagrees with the adapter in" in done.stderr
    done = finetune("check", recipe, f"adapter.from={tmp_path}", "--samples", "0", check=False)
    assert done.returncode == 2 and "so this is neither run nor adapter" in done.stderr


def test_a_checkpoint_of_a_run(first, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), [f"adapter.from={first / 'checkpoints' / 'step-2'}", "adapter.r=4"])
    base = find_base(recipe.model)
    settled, given, sha256 = settle_given_adapter(recipe, base, RunFolder(tmp_path / "run"), None)
    assert given.folder.name == "step-2" and given.sha256 == sha256 and given.record.style == "chat"
    assert settled.adapter.bias == "lora_only" and all(
        name.endswith(".in_proj") for name in settled.adapter.vision_targets
    )
    broken = tmp_path / "checkpoints" / "step-2"
    shutil.copytree(given.folder, broken)
    (broken / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-2 is damaged: optimizer.pt"):
        recipe = load_recipe(tmp_path / "recipe.yaml", [f"adapter.from={broken}", "adapter.r=4"])
        settle_given_adapter(recipe, base, RunFolder(tmp_path / "run"), None)


def test_a_folder_that_is_gone_is_named_where_nothing_was_saved(first, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), [f"adapter.from={tmp_path / 'gone'}"])
    stored = {"identity": {"recipe": recipe.model_dump(mode="json"), "adapter_from": "1"}}
    with pytest.raises(MissingFileError, match=r"gone: no adapter_config.json here"):
        settle_given_adapter(recipe, find_base(recipe.model), RunFolder(tmp_path / "run"), stored)


@pytest.mark.slow
def test_the_merged_result_is_the_trained_model(first, tmp_path):
    """With patterns, layers by number and biases: `finetune merge` compares the logits itself."""
    said = finetune("merge", first, "--to", tmp_path / "merged").stdout
    assert "(15 tensors: 3 trained in full, 6 LoRA)" in said and "no logit more than" in said
