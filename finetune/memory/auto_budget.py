"""The packing budget of a run: the recipe's, or the largest that the memory plan has room for.

The second is `data.tokens_per_batch: auto`.
"""

from collections.abc import Mapping
from typing import Any

from finetune.batches.budget import NOTES, ChosenBudget, packing_budget
from finetune.data.checks.checked import Checked
from finetune.memory.auto_switches import choose_switches
from finetune.memory.fitting import largest_budget
from finetune.memory.free_memory import USABLE, device_type, free_device_memory
from finetune.memory.sharding import Sharding
from finetune.memory.workload import different_rows, worst_workload
from finetune.quantities import format_bytes
from finetune.recipe import Recipe
from qwenvl import QwenVLConfig


def choose_budget(
    recipe: Recipe,
    config: QwenVLConfig,
    checked: Checked,
    stored: Mapping[str, Any] | None = None,
    sharding: Sharding | None = None,
) -> ChosenBudget:
    """Choose the budget of a run. To be called before its weights are loaded: the plan counts them.

    Args:
        recipe: as it is planned (`run_plan.settled`).
        checked: of the training data; at least one sample is kept.
        stored: run.json of the run that is resumed. It keeps its budget, so that it computes what it would have
            computed without the interruption, unless the recipe's own number has changed.
        sharding: see `plan.plan_memory`.
    """
    data = recipe.data
    is_auto = data.tokens_per_batch == "auto" and data.packing
    if stored is not None and "tokens_per_batch" in stored:
        before = stored["identity"]["recipe"]["data"].get("tokens_per_batch")
        if before == data.tokens_per_batch:
            reason = "what the run has had from its beginning" if is_auto else ""
            return ChosenBudget(stored["tokens_per_batch"], reason, tuple(stored[NOTES]))
    if not is_auto:
        return ChosenBudget(packing_budget(data, checked.lengths))
    free, where = free_device_memory(), device_type()
    return auto_budget(recipe, config, checked, free=free, device_type=where, sharding=sharding)


def auto_budget(
    recipe: Recipe,
    config: QwenVLConfig,
    checked: Checked,
    *,
    free: int,
    device_type: str,
    sharding: Sharding | None = None,
) -> ChosenBudget:
    """The largest packing budget that the memory plan has room for.

    A process packs the conversations of one batch, so no budget above the tokens of its longest possible batch changes
    anything. The budget is never below the longest conversation, which must be run in any case; whether that fits is
    for the run's plan to say.

    Args:
        recipe: as it is planned (`run_plan.settled`).
        free: bytes on the device before anything is loaded.
        device_type: cuda or cpu.
        sharding: see `plan.plan_memory`.
    """
    batch = recipe.train.per_device_train_batch_size
    longest = int(checked.lengths.max())
    rows = different_rows(checked, recipe.seed, batch)
    capacity = int(free * USABLE)
    # Other keys that say auto (mainly checkpointing) are settled for packs of the usual size. The budget then fills
    # the memory that is left.
    usual = worst_workload(**rows, budget=packing_budget(recipe.data, checked.lengths), batch=batch)
    switches = choose_switches(recipe, config, usual, capacity, device_type=device_type, sharding=sharding)
    fitting = largest_budget(recipe, config, capacity, **rows, switches=switches, sharding=sharding)
    where = f"the {format_bytes(free)} free on this {'GPU' if device_type == 'cuda' else 'machine'}"
    if fitting is None:
        return ChosenBudget(longest, f"the longest conversation (more does not fit into {where})")
    if fitting >= sum(sorted(rows["lengths"])[-batch:]):
        return ChosenBudget(fitting, f"all of a batch fits into {where}")
    return ChosenBudget(fitting, f"what fits into {where}")
