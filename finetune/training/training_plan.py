"""What a recipe leaves open, settled before the weights are loaded."""

from dataclasses import dataclass

from finetune.batches.budget import ChosenBudget
from finetune.errors import UserError
from finetune.memory.auto_budget import choose_budget
from finetune.memory.run_plan import plan_run, settled
from finetune.memory.sharding import sharding_of
from finetune.memory.switches import Switches
from finetune.recipe.checks import FLOAT16_BY_DEEPSPEED
from finetune.run.launch import launched_processes
from finetune.terminal import Say
from finetune.training.arguments import trainer_arguments
from finetune.training.opened_run import OpenedRun
from finetune.training.settings_check import check_settings
from finetune.training.trackers import TrackedConfig
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


def plan_training(opened: OpenedRun, say: Say) -> TrainingPlan:
    """Choose what fits into the memory that is free now, before the weights are loaded, which the plan counts.

    A run that is resumed keeps its budget and its optimizer.

    Raises:
        UserError: the run does not fit; with the settings that would make it fit.
    """
    recipe, base, stored, checked = opened.recipe, opened.base.path, opened.stored, opened.data.checked["train"]
    config = QwenVLConfig.from_pretrained(base)
    sharding = sharding_of(opened.parallel.way, launched_processes())
    budget = choose_budget(settled(recipe, base), config, checked, stored, sharding)
    if budget.reason:
        say("packing", budget)
    return TrainingPlan(budget, plan_run(recipe, base, checked, budget.tokens, stored, say, sharding))


def settle_arguments(opened: OpenedRun, plan: TrainingPlan, say: Say, *, own_optimizer: bool) -> TrackedConfig:
    """The trainer's configuration, checked against libraries, task and data before the weights are loaded.

    Args:
        own_optimizer: the caller of the training gives the optimizer.

    Raises:
        UserError: a setting would stop the run, or do something else than it says; with every reason.
    """
    recipe, task = opened.stepped, opened.data.task
    arguments = trainer_arguments(
        recipe, plan.switches, None if task is None else task.key, opened.computes_in, opened.parallel
    )
    if arguments.fp16 and opened.parallel.zero_stage:  # as `model.dtype: auto` comes to on an older GPU
        raise UserError(
            f"model.dtype: auto is float16 on this GPU, and {FLOAT16_BY_DEEPSPEED}: set train.parallel: fsdp"
        )
    if opened.resumes:
        arguments.eval_on_start = False  # it took place when the run began
    notes = check_settings(
        recipe,
        arguments,
        samples=len(opened.data.checked["train"].first_epoch(recipe.seed)),
        processes=launched_processes(),
        task=task,
        own_optimizer=own_optimizer,
    )
    for number, note in enumerate(notes):
        say("" if number else "settings", note)
    return arguments
