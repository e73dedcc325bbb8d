"""`--extend`: a run goes on for more epochs or steps than it was begun with.

The weights, the optimizer's moments, the random state and the order of the data go on as in a resume. The learning
rate is from there on that of the longer run's schedule, as though the run had been as long from the start.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType

from finetune.errors import UserError
from finetune.quantities import format_learning_rate
from finetune.run.checkpoints import Found
from finetune.run.folder import RunFolder
from finetune.terminal import Say

EXTENSIONS = "extended"
"""Key of run.json: where the run was extended, oldest first."""


@dataclass(frozen=True)
class Extension:
    """A run that was made longer.

    Attributes:
        at_step: of the checkpoint that it went on from.
        key: of the recipe, that says how long the run is.
        was, now: its values.
        finished: when the shorter run was finished; None where it was not.
    """

    at_step: int
    key: str
    was: float
    now: float
    finished: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What run.json notes of it."""
        return asdict(self)


def length_key(recipe: Mapping[str, Any]) -> str:
    """The key that says how long a run is: its steps where they are set, else its epochs.

    Args:
        recipe: as JSON.
    """
    return "max_steps" if recipe["train"]["max_steps"] > 0 else "num_train_epochs"


def made_longer(was: Any, now: Mapping[str, Any]) -> str | None:
    """The key by which a run is longer than it was; None where it is not, or what is noted of it does not say.

    Args:
        was, now: recipes as JSON.
    """
    key = length_key(now)
    try:
        longer = key == length_key(was) and now["train"][key] > was["train"][key]
    except (KeyError, TypeError):
        return None
    return key if longer else None


def refuse_no_extension(run: RunFolder, stored: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """Check that a recipe makes the run in its folder longer.

    Args:
        stored: what run.json says; None where there is none.
        now: the recipe as JSON.

    Returns:
        The key by which it is longer; empty where the run was made as long before, and goes on.

    Raises:
        UserError: there is no run, or it is not made longer.
    """
    if stored is None or "identity" not in stored:
        raise UserError(f"--extend: there is no run in {run.path} to go on with: leave --extend out to begin one")
    was = stored["identity"].get("recipe")
    key = made_longer(was, now)
    if key is not None:
        return key
    key = length_key(now)
    try:
        length_key(was)
    except (KeyError, TypeError):
        raise UserError(f"{run.run_file} is damaged: it does not say how long the run is. Restore it") from None
    if length_key(was) != key:
        raise UserError(
            f"--extend: the run in {run.path} is as long as train.{length_key(was)} says, and the recipe sets "
            f"train.{key}: set a larger train.{length_key(was)} instead"
        )
    before = was["train"][key]
    if stored.get(EXTENSIONS) and now["train"][key] == before:
        return ""
    raise UserError(
        f"--extend: train.{key} is {now['train'][key]}, and was {before} in {run.path}: set it higher, for how long "
        "the run shall be in all"
    )


def extension_of(
    run: RunFolder, stored: Mapping[str, Any], now: Mapping[str, Any], key: str, last: Found
) -> Extension | None:
    """How a run is made longer, from its last checkpoint on; None where it has no checkpoint and begins anew.

    Args:
        now: the recipe as JSON.
        key: by which it is longer.
        last: the last good checkpoint.

    Raises:
        UserError: the run is finished, and the state of its last step is not there, or it was stopped early.
    """
    if stored.get("status") == "finished":
        _refuse_lost_state(run, stored, last)
    if last.path is None:
        return None
    was = stored["identity"]["recipe"]["train"][key]
    return Extension(last.step, f"train.{key}", was, now["train"][key], stored.get("finished"))


def _refuse_lost_state(run: RunFolder, stored: Mapping[str, Any], last: Found) -> None:
    steps = stored.get("steps")
    if last.path is None or last.step != steps:
        there = "there is none" if last.path is None else f"the last good one is that of step {last.step}"
        damaged = "".join(f"; {folder.name} is damaged ({reason})" for folder, reason in last.damaged)
        raise UserError(
            f"--extend: {run.path} has no checkpoint of its last step, {steps}, to go on from: {there}{damaged}. "
            "Its adapter can be gone on from in a new run (adapter.from), with a new optimizer"
        )
    state = json.loads((last.path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    if state["global_step"] < state["max_steps"]:
        raise UserError(
            f"--extend: {run.path} ended at step {steps} of {state['max_steps']}, by evaluate.patience: it was long "
            "enough. Its adapter can be gone on from in a new run (adapter.from)"
        )
    if not (last.path / SCHEDULER_NAME).is_file():
        raise UserError(
            f"--extend: {last.path} has the weights alone (train.save_only_model), without the optimizer's state. Its "
            "adapter can be gone on from in a new run (adapter.from)"
        )


def pending(extensions: Sequence[Mapping[str, Any]], step: int) -> bool:
    """Whether a checkpoint is from before the run was made longer, so that its learning rate is the shorter run's."""
    return bool(extensions) and step <= extensions[-1]["at_step"]


class FollowLongerSchedule(TrainerCallback):
    """Sets the learning rate to what the longer run's schedule has at the step that training goes on from.

    A checkpoint has the rate that the shorter run would have gone on with, which the next step would still take.

    Args:
        say: prints a labelled line.
    """

    def __init__(self, say: Say):
        self.say = say

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        scheduler = lr_scheduler.scheduler if isinstance(lr_scheduler, AcceleratedScheduler) else lr_scheduler
        assert optimizer is not None
        kind = SchedulerType(args.lr_scheduler_type).value
        where = f"from step {state.global_step} on, of {state.max_steps}"
        if not isinstance(scheduler, LambdaLR):
            self.say("schedule", f"{where}: {kind} does not go by the number of steps")
            return
        before = format_learning_rate(float(optimizer.param_groups[0]["lr"]))
        rates = [
            float(base) * factor(scheduler.last_epoch)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = list(rates)
        self.say(
            "schedule",
            f"{where}, the learning rate is that of the longer run's schedule ({kind}): "
            f"{format_learning_rate(rates[0])} at this step, where the shorter run's was {before}",
        )
