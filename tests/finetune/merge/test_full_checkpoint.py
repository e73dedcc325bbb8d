"""`finetune merge RUN --checkpoint step-N`: the model of a checkpoint, whole or in the parts that processes wrote."""

import json
import shutil

import pytest
import torch
from recipes_for_tests import finetune, write_recipe
from safetensors.torch import load_file

from finetune.files.shards import SHARDS
from finetune.run.checkpoints import writing
from finetune.training.sharded_checkpoint import save_shards
from qwenvl import load_model

SHORT = {"train__max_steps": 2, "train__save_steps": 1, "train__gradient_accumulation_steps": 1}
FULL = {"adapter": None, "freeze": {"vision": True, "resampler": False, "language": False}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    finetune(write_recipe(folder, **SHORT, **FULL, train__learning_rate=1e-3))
    return folder / "run"


def in_parts(checkpoint):
    """Make a whole checkpoint one of parts."""
    model = load_model(checkpoint)
    with writing(checkpoint) as partial:
        for file in checkpoint.iterdir():
            if file.name not in ("model.safetensors", "manifest.json", "optimizer.pt"):
                shutil.copy(file, partial)
        save_shards(partial, model, torch.optim.AdamW(model.parameters()), is_main=True)


def test_the_model_of_a_checkpoint_is_what_the_run_would_have_saved(run, tmp_path):
    for step in (1, 2):
        finetune("merge", run, "--checkpoint", f"step-{step}", "--to", tmp_path / f"whole{step}")
    for file in (run / "model").iterdir():
        if file.name not in ("model.safetensors", "manifest.json"):
            assert (tmp_path / "whole2" / file.name).read_bytes() == file.read_bytes(), file.name
    saved = load_file(run / "model" / "model.safetensors")
    last, first = (load_file(tmp_path / name / "model.safetensors") for name in ("whole2", "whole1"))
    assert last.keys() == saved.keys()
    assert all(torch.equal(last[name], value) for name, value in saved.items())
    assert not torch.equal(first["lm_head.weight"], saved["lm_head.weight"])

    in_parts(run / "checkpoints" / "step-1")
    assert (run / "checkpoints" / "step-1" / SHARDS).is_dir()
    finetune("merge", run, "--checkpoint", "step-1", "--to", tmp_path / "parts", "--dtype", "bfloat16")
    parts = load_file(tmp_path / "parts" / "model.safetensors")
    assert all(torch.equal(parts[name], value.bfloat16()) for name, value in first.items())
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    load_model(tmp_path / "parts")


def test_what_cannot_be_merged_is_refused(run, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "mine").write_text("")
    for words, said in (
        (("--checkpoint", "step-7", "--to", tmp_path / "to"), "There are: step-1, step-2"),
        (
            ("--checkpoint", "step-2", "--to", tmp_path / "to", "--style", "chat"),
            "--style, --onto and --no-check are for adapters",
        ),
        (("--checkpoint", "step-2", "--to", there), "not empty"),
    ):
        done = finetune("merge", run, *words, check=False)
        assert done.returncode == 2
        assert said in done.stderr
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    (damaged / "checkpoints" / "step-2" / "config.json").write_text("{}")
    done = finetune("merge", damaged, "--checkpoint", "step-2", "--to", tmp_path / "to", check=False)
    assert done.returncode == 2
    assert "config.json" in done.stderr
    assert not (tmp_path / "to").exists()


@pytest.mark.slow
def test_an_adapter_of_a_checkpoint(tmp_path):
    finetune(write_recipe(tmp_path, **SHORT))
    run = tmp_path / "run"
    finetune("merge", run, "--to", tmp_path / "result")
    for step in (1, 2):
        finetune("merge", run, "--checkpoint", f"step-{step}", "--to", tmp_path / f"step{step}")
    result, first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("result", "step1", "step2"))
    assert all(torch.equal(last[name], value) for name, value in result.items())
    assert any(not torch.equal(first[name], value) for name, value in result.items())
