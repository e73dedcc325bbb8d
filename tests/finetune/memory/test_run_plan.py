import io
import json

import pytest
import torch
from plans_for_tests import real_batch, real_model, recipe_of
from recipes_for_tests import write_recipe
from rich.console import Console
from said import collect

from finetune.check.findings import look_before_training
from finetune.check.page import check_page
from finetune.check.terminal import print_findings
from finetune.errors import UserError
from finetune.memory import run_plan
from finetune.memory.run_plan import host_memory
from finetune.memory.workload import Workload
from finetune.recipe import load_recipe
from finetune.terminal import say_nothing
from finetune.training.train import train


def small_gpu(monkeypatch, free: int):
    """As if there were a GPU with so many bytes free; what would go there is planned only."""
    monkeypatch.setattr(run_plan, "device_type", lambda: "cuda")
    monkeypatch.setattr(run_plan, "free_device_memory", lambda: free)


def test_a_run_that_cannot_fit_the_gpu_is_refused_before_weights_load(tmp_path, monkeypatch):
    small_gpu(monkeypatch, 32_000_000)
    monkeypatch.setattr("finetune.training.trained_model.load_model", None)
    said = []
    with pytest.raises(UserError, match=r"the run needs .* can be used of what is free on the GPU") as refused:
        train(load_recipe(write_recipe(tmp_path), ["train.gradient_checkpointing=false"]), say=collect(said))
    assert any(line.startswith("memory ") for line in said)
    remedy = str(refused.value).splitlines()[-1].strip()
    assert "=" in remedy, refused.value


def test_a_check_tells_it_with_the_rest(tmp_path, monkeypatch):
    small_gpu(monkeypatch, 1_000_000)
    recipe = load_recipe(write_recipe(tmp_path))
    findings = look_before_training(recipe, samples=0, images=False, processes=1)
    assert [what for what, _ in findings.refusals] == ["memory"]
    assert findings.memory.plan.peak > findings.memory.capacity


def test_a_check_shows_the_plan(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), ["train.checkpointing=null"])
    findings = look_before_training(recipe, samples=0, images=False, processes=1)
    console = Console(file=io.StringIO(), width=200)
    print_findings(findings, console)
    shown, page = console.file.getvalue(), check_page(findings)
    for text in ("optimizer states", "working memory", "fits a GPU of 6 GB or more"):
        assert text in shown
        assert text in page


def test_host_memory_that_is_taken_meanwhile_refuses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(run_plan, "free_device_memory", lambda: 1_000_000)
    findings = look_before_training(load_recipe(write_recipe(tmp_path)), samples=0, images=False, processes=1)
    assert not findings.refusals
    monkeypatch.setattr(run_plan, "host_memory", lambda: 1_000_000)
    findings = look_before_training(load_recipe(write_recipe(tmp_path)), samples=0, images=False, processes=1)
    assert [what for what, _ in findings.refusals] == ["memory"]


def test_a_resumed_run_keeps_its_optimizer(tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path), ["train.optim=auto", "train.max_steps=2", "evaluate=null"])
    run = train(recipe, say=say_nothing)
    stored = json.loads((run / "run.json").read_text())
    assert stored["switches"] == {"optim": "adamw_torch"}
    stored["switches"]["optim"] = "sgd"
    checked = look_before_training(recipe, samples=0, images=False, processes=1).parts["train"].checked
    found = run_plan.look_at_memory(recipe, recipe.model.path, checked, 512, stored)
    assert found.switches.optim == "sgd"
    assert run_plan.look_at_memory(recipe, recipe.model.path, checked, 512).switches.optim == "adamw_torch"


def test_embeddings_of_a_16_bit_base_may_stay_in_host_memory():
    """LoRA on a base that is not in 4 bits: the same loss and gradients, wherever the table lies."""
    pack = Workload(300, 40, 1, 1, 300)
    torch.manual_seed(0)
    batch, results = real_batch(pack), []
    for overrides in ([], ["model.embeddings_on_cpu=true"]):
        torch.manual_seed(1)
        model = real_model(recipe_of("adapter.dropout=0", *overrides)).train()
        loss = model(
            batch["input_ids"], pixel_values=batch["pixel_values"], labels=batch["labels"], use_cache=False
        ).loss
        loss.backward()
        results.append((loss, {name: one.grad for name, one in model.named_parameters() if one.grad is not None}))
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys()
    assert all(torch.equal(one, other_gradients[name]) for name, one in gradients.items())


def test_the_limit_of_a_container(tmp_path):
    whole = host_memory(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(tmp_path) == whole
    (tmp_path / "memory.max").write_text("1000000\n")
    assert host_memory(tmp_path) == 1_000_000


def test_a_model_that_cards_share_is_planned_for_each(tmp_path, monkeypatch):
    settings = {"adapter": None, "freeze": {"language": False}, "train__parallel": "fsdp", "model__dtype": "bfloat16"}
    recipe = load_recipe(write_recipe(tmp_path, **settings))
    alone = look_before_training(recipe, samples=0, images=False, processes=1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    shared = look_before_training(recipe, samples=0, images=False, processes=1)
    assert alone.memory.sharding is None
    assert "on each of 4 GPUs that share the model" in shared.memory.lines()
    states = [found.memory.plan["train"].parts["optimizer states"] for found in (alone, shared)]
    assert states[1] == pytest.approx(states[0] / 4, rel=0.01)
    assert alone.cards == shared.cards == "fits 1 x 6 GB"
