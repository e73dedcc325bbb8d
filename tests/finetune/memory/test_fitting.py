import pytest
from plans_for_tests import recipe_of

from finetune.memory import fitting
from finetune.memory.auto_switches import choose_switches
from finetune.memory.fitting import STEP, largest_budget, remedies, what_does_not_fit
from finetune.memory.plan import plan_memory
from finetune.memory.switches import Switches
from finetune.memory.workload import Workload, worst_workload
from finetune.recipe import parse_recipe
from qwenvl import QwenVLConfig

GB = 1_000_000_000
PUBLISHED = QwenVLConfig()
SWITCHES = Switches("varlen", "torch", "full", "adamw_torch_fused", "off")
ROWS = {
    "lengths": [300, 420, 380, 800, 350, 280, 610, 500],
    "supervised": [20, 60, 30, 200, 30, 12, 80, 100],
    "images": [1, 1, 1, 2, 1, 1, 1, 1],
}


def peak(recipe, budget: int) -> int:
    workload = worst_workload(**ROWS, budget=budget, batch=recipe.train.per_device_train_batch_size)
    return plan_memory(recipe, PUBLISHED, workload, switches=SWITCHES).peak


def test_the_largest_budget_fits_and_a_little_more_does_not():
    recipe = recipe_of("model.dtype=bfloat16", "train.per_device_train_batch_size=8", "data.max_length=800")
    everything = sum(ROWS["lengths"])
    least, most = peak(recipe, 800), peak(recipe, everything)
    budget = largest_budget(recipe, PUBLISHED, capacity := (least + most) // 2, **ROWS, switches=SWITCHES)
    assert 800 < budget < everything
    assert peak(recipe, budget) <= capacity < peak(recipe, budget + STEP)


def test_the_ends_of_the_budget():
    recipe = recipe_of("model.dtype=bfloat16", "train.per_device_train_batch_size=8", "data.max_length=800")
    budget = lambda capacity: largest_budget(recipe, PUBLISHED, capacity, **ROWS, switches=SWITCHES)  # noqa: E731
    assert budget(peak(recipe, 800) - 1) is None
    assert budget(peak(recipe, 800)) == 800
    assert budget(200 * GB) == sum(ROWS["lengths"])
    one_by_one = recipe_of("model.dtype=bfloat16", "data.max_length=800")
    assert largest_budget(one_by_one, PUBLISHED, 200 * GB, **ROWS, switches=SWITCHES) == sum(
        sorted(ROWS["lengths"])[-8:]
    )


@pytest.mark.parametrize("capacity", [22, 15, 8])
def test_every_remedy_makes_it_fit(capacity):
    recipe = recipe_of("model.dtype=bfloat16", "train.checkpointing=none", "data.max_length=1024")
    workload, capacity = Workload(2048, 500, 4, 4, 1024), capacity * GB
    switches = choose_switches(recipe, PUBLISHED, workload, capacity, device_type="cuda")
    assert plan_memory(recipe, PUBLISHED, workload, switches=switches).peak > capacity
    found = remedies(recipe, PUBLISHED, workload, capacity, switches=switches)
    assert found
    for remedy in found:
        settings = remedy.replace(", ", ",").split(" ")
        mended = parse_recipe(recipe.to_yaml(), settings)
        budget = mended.data.tokens_per_batch
        tried = workload if budget is None else Workload(budget, 500, 2, min(4, budget // 258), 1024)
        chosen = choose_switches(mended, PUBLISHED, tried, capacity, device_type="cuda")
        assert plan_memory(mended, PUBLISHED, tried, switches=chosen).fits(capacity), remedy


def test_a_card_on_which_nothing_helps():
    recipe = recipe_of("model.dtype=bfloat16")
    workload = Workload(512, 100, 1, 1, 512)
    plan = plan_memory(recipe, PUBLISHED, workload, switches=SWITCHES)
    said = what_does_not_fit(recipe, plan, PUBLISHED, GB, switches=SWITCHES)
    assert "No setting known here makes it fit" in said
    assert "21." in said
    said = what_does_not_fit(recipe, plan, PUBLISHED, 20 * GB + GB // 2, switches=SWITCHES)
    assert "It would fit, by the plan, with" in said
    assert "model.embeddings_on_cpu=true" in said


def test_remedies_without_bitsandbytes(monkeypatch):
    """Those that need it are left out: they could neither be planned nor taken."""
    monkeypatch.setattr(fitting, "find_spec", lambda name: None)
    recipe = recipe_of("model.dtype=bfloat16")
    found = remedies(recipe, PUBLISHED, Workload(512, 100, 1, 1, 512), 20 * GB + GB // 2, switches=SWITCHES)
    assert found and not any("nf4" in one or "8bit" in one for one in found)


def test_remedies_go_with_the_recipe():
    """Nothing is named that the recipe refuses: with everything in full, 4 bits and an adapter's rank are no help."""
    recipe = recipe_of("model.dtype=bfloat16", "adapter=null", "freeze.language=false")
    workload = Workload(512, 100, 1, 1, 512)
    found = remedies(recipe, PUBLISHED, workload, 120 * GB, switches=SWITCHES)
    assert found
    assert not any("nf4" in one or "adapter" in one or "embeddings_on_cpu" in one for one in found)
