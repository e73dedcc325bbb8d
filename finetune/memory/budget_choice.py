"""The packing budget of a run: what an earlier part of it had, what the recipe says or, with `auto`, what fits."""

from collections.abc import Mapping
from typing import Any

from finetune.data.checking import Checked
from finetune.memory.free_memory import device_type, free_device_memory
from finetune.memory.packing_budget import NOTES, ChosenBudget, packing_budget
from finetune.recipe import Recipe
from qwenvl import QwenVLConfig


def choose_budget(
    recipe: Recipe, config: QwenVLConfig, checked: Checked, stored: Mapping[str, Any] | None = None
) -> ChosenBudget:
    """The budget of a run; to be called before its weights are loaded, which the plan counts.

    Args:
        recipe: as it is planned (`run_plan.settled`).
        checked: of the training data; at least one sample is kept.
        stored: run.json of the run that this one goes on with. It keeps the budget it had, so that it computes what it
            would have computed without the interruption; unless the recipe's own number has changed.
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
    from finetune.memory.auto_budget import auto_budget  # it plans, which takes the model's code

    return auto_budget(recipe, config, checked, free=free_device_memory(), device_type=device_type())
