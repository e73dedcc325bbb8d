"""`data.tokens_per_batch: auto`: as much as there is memory for, no more than a batch has, the same after a resume."""

import json

import numpy as np
import pytest
from recipes_for_tests import TINY, write_recipe
from said import collect

from finetune.check.findings import look_before_training
from finetune.data.checks.checked import Checked
from finetune.errors import UserError
from finetune.memory.auto_budget import auto_budget, choose_budget
from finetune.memory.auto_switches import choose_switches
from finetune.memory.free_memory import USABLE
from finetune.memory.plan import plan_memory
from finetune.memory.workload import worst_workload
from finetune.recipe import load_recipe
from finetune.terminal import say_nothing
from finetune.training.train import train
from qwenvl import QwenVLConfig

GB = 1_000_000_000
LENGTHS = [300, 500, 900, 1200, 300, 400, 1500, 600]


def checked(lengths=LENGTHS, weight=1.0):
    count, lengths = len(lengths), np.array(lengths)
    return Checked(
        np.arange(count),
        lengths,
        np.ones(count, np.int64),
        lengths // 4,
        np.zeros(count, int),
        [weight],
        [],
        0,
        [],
        [],
    )


def auto(tmp_path, free, *overrides, data=None):
    overrides = ["data.tokens_per_batch=auto", "train.per_device_train_batch_size=4", *overrides]
    recipe = load_recipe(write_recipe(tmp_path), overrides)
    config = QwenVLConfig.from_pretrained(TINY)
    return auto_budget(recipe, config, data or checked(), free=free, device_type="cpu"), recipe, config


def peak(recipe, config, budget, capacity, data=None):
    data = data or checked()
    rows = (data.lengths.tolist(), data.supervised.tolist(), data.images.tolist())
    workload = worst_workload(*rows, budget=budget, batch=4)
    switches = choose_switches(recipe, config, workload, capacity, device_type="cpu")
    return plan_memory(recipe, config, workload, switches=switches).peak


def test_with_much_memory_it_is_what_a_batch_can_have(tmp_path):
    budget, *_ = auto(tmp_path, 100 * GB)
    assert budget.tokens == 1500 + 1200 + 900 + 600
    assert str(budget) == "up to 4,200 tokens in one forward: all of a batch fits into the 100 GB free on this machine"
    assert auto(tmp_path, 100 * GB, data=checked(weight=2.0))[0].tokens == 2 * 1500 + 2 * 1200
    assert auto(tmp_path, 100 * GB, "train.per_device_train_batch_size=1")[0].tokens == 1500


def test_with_less_it_is_what_fits(tmp_path):
    _, recipe, config = auto(tmp_path, 100 * GB)
    # Between what the longest conversation and what a whole batch need.
    least, most = (peak(recipe, config, budget, 100 * GB) for budget in (1500, 4200))
    capacity = (least + most) // 2
    budget, *_ = auto(tmp_path, int(capacity / USABLE) + 1)
    assert 1500 < budget.tokens < 4200 and "what fits into" in budget.reason
    assert peak(recipe, config, budget.tokens, 100 * GB) <= capacity
    assert peak(recipe, config, budget.tokens + 100, 100 * GB) > capacity


def test_it_is_never_below_the_longest_conversation(tmp_path):
    budget, *_ = auto(tmp_path, 1_000_000)
    assert budget.tokens == 1500 and "more does not fit into the 1.0 MB free" in budget.reason


def test_a_run_keeps_its_budget(tmp_path, monkeypatch):
    """It is said, recorded, and taken again, with however much memory there is then."""
    changes = {"data__tokens_per_batch": "auto", "train__per_device_train_batch_size": 4, "train__max_steps": 1}
    recipe = load_recipe(write_recipe(tmp_path, **changes, train__gradient_accumulation_steps=1))
    said = []
    train(recipe, collect(said))
    (line,) = [line for line in said if line.startswith("packing ")]
    assert "all of a batch fits" in line
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert f"up to {stored['tokens_per_batch']:,} tokens" in line
    monkeypatch.setattr("finetune.memory.auto_budget.free_device_memory", lambda: 1_000_000)
    config = QwenVLConfig.from_pretrained(TINY)
    kept = choose_budget(recipe, config, checked(), stored)
    assert kept.tokens == stored["tokens_per_batch"] and "from its beginning" in kept.reason
    assert choose_budget(recipe, config, checked()).tokens == 1500
    # A number of the user's own counts, and what did not fit before says nothing about it.
    stored["out_of_memory"] = [{"step": 1, "tokens_per_batch": 700, "out_of_memory_tokens": 1400}]
    assert choose_budget(recipe, config, checked(), stored).lowered == tuple(stored["out_of_memory"])
    changed = load_recipe(tmp_path / "recipe.yaml", ["data.tokens_per_batch=2500"])
    assert choose_budget(changed, config, checked(), stored).tokens == 2500
    assert not choose_budget(changed, config, checked(), stored).lowered


def test_check_tells_it(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), ["data.tokens_per_batch=auto", "train.per_device_train_batch_size=4"])
    findings = look_before_training(recipe, samples=0, images=False)
    assert findings.epoch.budget == findings.budget.tokens and findings.budget.reason


def test_what_cannot_be_is_refused_with_remedies(tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path), ["data.tokens_per_batch=auto"])
    monkeypatch.setattr("finetune.memory.auto_budget.free_device_memory", lambda: 1_000_000)
    monkeypatch.setattr("finetune.memory.run_plan.host_memory", lambda: 1_000_000)
    with pytest.raises(UserError, match="the run needs"):
        train(recipe, say_nothing)
