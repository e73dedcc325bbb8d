"""What a recipe leaves open, settled before the weights are loaded."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from finetune.batches.budget import ChosenBudget
from finetune.batches.steps import processes_of_environment
from finetune.data.checks.checked import Checked
from finetune.memory.auto_budget import choose_budget
from finetune.memory.run_plan import plan_run, settled
from finetune.memory.sharding import sharding_of
from finetune.memory.switches import Switches
from finetune.recipe import Recipe
from finetune.terminal import Say
from finetune.training.arguments import trainer_arguments
from finetune.training.parallel import Parallel
from finetune.training.settings_check import check_settings
from finetune.training.trackers import TrackedConfig
from finetune.training.training_data import TrainingData
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


def settled_arguments(
    recipe: Recipe,
    plan: TrainingPlan,
    data: TrainingData,
    computes_in: torch.dtype,
    parallel: Parallel,
    say: Say,
    *,
    resumes: bool,
    own_optimizer: bool,
) -> TrackedConfig:
    """The trainer's configuration, checked against libraries, task and data before the weights are loaded.

    Args:
        computes_in: dtype of frozen weights and activations.
        parallel: how processes share the work.
        resumes: the run goes on from a checkpoint.
        own_optimizer: the caller of the training gives the optimizer.

    Raises:
        UserError: a setting would stop the run, or do something else than it says; with every reason.
    """
    task = data.task
    arguments = trainer_arguments(recipe, plan.switches, None if task is None else task.key, computes_in, parallel)
    if resumes:
        arguments.eval_on_start = False  # it took place when the run began
    notes = check_settings(
        recipe,
        arguments,
        samples=len(data.checked["train"].first_epoch(recipe.seed)),
        processes=processes_of_environment(),
        task=task,
        own_optimizer=own_optimizer,
    )
    for number, note in enumerate(notes):
        say("" if number else "settings", note)
    return arguments
