"""What a recipe leaves open, settled before the weights are loaded."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.batches.budget import ChosenBudget
from finetune.data.checks.checked import Checked
from finetune.memory.auto_budget import choose_budget
from finetune.memory.run_plan import plan_run, settled
from finetune.memory.sharding import sharding_of
from finetune.memory.switches import Switches
from finetune.recipe import Recipe
from finetune.terminal import Say
from qwenvl import QwenVLConfig


@dataclass(frozen=True)
class TrainingPlan:
    """How the memory of the device is used.

    Attributes:
        budget: tokens of one forward.
        switches: optimizer, recomputation, attention, kernels and vision cache, none of them `auto`.
    """

    budget: ChosenBudget
    switches: Switches


def plan_training(
    recipe: Recipe, base: str, checked: Checked, stored: Mapping[str, Any] | None, say: Say
) -> TrainingPlan:
    """Choose what fits into the memory that is free now, before the weights are loaded, which the plan counts.

    Args:
        base: folder or hub id of the checkpoint.
        checked: the training data.
        stored: run.json of the run that is resumed; it keeps its budget and optimizer.

    Raises:
        UserError: the run does not fit; with the settings that would make it fit.
    """
    config = QwenVLConfig.from_pretrained(base)
    sharding = sharding_of(recipe, int(os.environ.get("WORLD_SIZE") or 1))
    budget = choose_budget(settled(recipe, base), config, checked, stored, sharding)
    if budget.reason:
        say("packing", budget)
    return TrainingPlan(budget, plan_run(recipe, base, checked, budget.tokens, stored, say, sharding))
