"""Settings of the `train` section that only the libraries can judge, before weights are loaded: packages, arguments of
optimizer and schedule, names of scores, and whether steps and samples go together."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import Trainer
from transformers.integrations import integration_utils
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import is_bitsandbytes_available
from trl import SFTConfig

from finetune.batches.steps import Steps, count_steps
from finetune.errors import UserError
from finetune.evaluation.task_evaluation import TaskEvaluation
from finetune.memory.optimizer import of_bitsandbytes
from finetune.quantities import format_learning_rate
from finetune.recipe import Recipe
from finetune.recipe.best_score import LOSS, followed_score, follows_score
from finetune.recipe.problems import nearest

TRACKERS: dict[str, tuple[Callable[[], bool], str]] = {
    "azure_ml": (integration_utils.is_azureml_available, "azureml-core"),
    "clearml": (integration_utils.is_clearml_available, "clearml"),
    "codecarbon": (integration_utils.is_codecarbon_available, "codecarbon"),
    "comet_ml": (integration_utils.is_comet_available, "comet-ml"),
    "dagshub": (integration_utils.is_dagshub_available, "dagshub mlflow"),
    "dvclive": (integration_utils.is_dvclive_available, "dvclive"),
    "flyte": (integration_utils.is_flytekit_available, "flytekit"),
    "mlflow": (integration_utils.is_mlflow_available, "mlflow"),
    "neptune": (integration_utils.is_neptune_available, "neptune"),
    "swanlab": (integration_utils.is_swanlab_available, "swanlab"),
    "tensorboard": (integration_utils.is_tensorboard_available, "tensorboard"),
    "trackio": (integration_utils.is_trackio_available, "trackio"),
    "wandb": (integration_utils.is_wandb_available, "wandb"),
}
"""What `report_to` may name: whether its package is there, and what pip installs it by."""

SAMPLED_STEPS = 1000  # at which a schedule is looked at


def check_settings(
    recipe: Recipe,
    arguments: SFTConfig,
    *,
    samples: int,
    processes: int,
    task: TaskEvaluation | None,
    own_optimizer: bool = False,
) -> list[str]:
    """Check a run's settings against the libraries that are installed, the task and the number of samples.

    Args:
        arguments: the trainer's, made of the recipe.
        samples: of an epoch.
        task: that is evaluated; None where there is none.
        own_optimizer: whether the caller gives an optimizer of its own, so that `train.optim` is not used.

    Returns:
        What a user should know of them, a sentence each.

    Raises:
        UserError: a run would stop, or do something else than it says; with every reason.
    """
    steps = count_steps(recipe.train, samples, processes)
    problems = [
        *_trackers(arguments.report_to or ()),
        *(() if own_optimizer else _optimizer(arguments)),
        *_score(recipe, task),
        *_batches(recipe, steps, samples, processes),
    ]
    notes: list[str] = []
    problems += _schedule(arguments, steps.all, notes)
    if problems:
        raise UserError("\n".join(problems))
    return notes


def _trackers(names: str | Sequence[str]) -> Iterator[str]:
    for name in [names] if isinstance(names, str) else names:
        if name not in TRACKERS:
            # Transformers adds Kubeflow itself where its environment asks for it.
            if name != "kubeflow" or not integration_utils.is_kubeflow_available():
                meant = nearest(name, list(TRACKERS))
                said = f"did you mean {' or '.join(meant)}? " if meant else ""
                yield f"train.report_to: {name} is unknown; {said}It takes {', '.join(TRACKERS)}, none or all"
            continue
        is_there, package = TRACKERS[name]
        if not is_there():
            yield f"train.report_to: {name} needs a package that is not installed: pip install {package}"


def _optimizer(arguments: SFTConfig) -> Iterator[str]:
    """Make the optimizer for a small parameter, and step it once on the run's device."""
    name = OptimizerNames(arguments.optim).value
    if of_bitsandbytes(name) and not is_bitsandbytes_available():
        why = "is not installed: pip install bitsandbytes"
        if find_spec("bitsandbytes") is not None:
            why = "does not go with the PyTorch that is installed: pip install -U bitsandbytes"
        yield f"train.optim: {name} needs bitsandbytes, which {why}"
        return
    key = "train.optim_args" if arguments.optim_args else "train.optim"
    parameter = torch.nn.Parameter(torch.ones(64, 128, device=arguments.device))
    parameter.grad = torch.zeros_like(parameter)
    try:
        made, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        made([{"params": [parameter]}], **settings).step()
    except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        yield f"{key}: {name} cannot be made: {_one_line(error)}"


def _schedule(arguments: SFTConfig, steps: int, notes: list[str]) -> Iterator[str]:
    kind = SchedulerType(arguments.lr_scheduler_type)
    name, given = kind.value, arguments.lr_scheduler_kwargs or {}
    assert isinstance(given, dict), "a recipe takes a mapping alone"
    function: Any = TYPE_TO_SCHEDULER_FUNCTION[kind]
    if name == "reduce_lr_on_plateau":
        function = ReduceLROnPlateau  # what Transformers' function hands all arguments on to
    ours = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "self")
    taken = {key: about for key, about in inspect.signature(function).parameters.items() if key not in ours}
    unknown = [key for key in given if key not in taken]
    missing = [key for key, about in taken.items() if about.default is about.empty and key not in given]
    for key in unknown:
        meant = nearest(key, list(taken))
        takes = f"did you mean {' or '.join(meant)}?" if meant else f"it takes {', '.join(taken) or 'nothing'}"
        yield f"train.lr_scheduler_kwargs: {name} takes no {key}; {takes}"
    if missing:
        yield f"train.lr_scheduler_kwargs: {name} needs {', '.join(missing)}: write {{{missing[0]}: ...}}"
    if unknown or missing:
        return
    warmup = arguments.get_warmup_steps(steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=arguments.learning_rate)
    try:
        schedule = get_scheduler(name, optimizer, warmup, steps, dict(given))
        rates = _rates(schedule, steps)
    except (TypeError, ValueError, ArithmeticError) as error:
        yield f"train.lr_scheduler_kwargs: {name} cannot be made: {_one_line(error)}"
        return
    if not all(map(math.isfinite, rates)) or min(rates) < 0:
        wrong = next(rate for rate in rates if not math.isfinite(rate) or rate < 0)
        yield f"train.lr_scheduler_kwargs: the learning rate of {name} would be {wrong} at a step: give other values"
        return
    highest, wanted = max(rates), arguments.learning_rate
    said = f"{format_learning_rate(highest)}, and train.learning_rate is {format_learning_rate(wanted)}"
    if highest > wanted * 1.001:
        yield f"train.lr_scheduler_kwargs: the learning rate would rise to {said}; lower min_lr, or raise it"
    elif warmup >= steps > 1:
        notes.append(
            f"the warm-up has {warmup:,} steps (train.warmup_steps) and the run {steps:,}: the learning rate gets to "
            f"{said}"
        )
    decay = given.get("num_decay_steps", 0) if name == "warmup_stable_decay" else 0
    if decay and warmup < steps < warmup + decay:
        notes.append(
            f"warm-up and decay have {warmup:,} and {decay:,} steps (num_decay_steps) and the run {steps:,}: the "
            "decay does not come to its end"
        )


def _rates(schedule: object, steps: int) -> list[float]:
    """The learning rates at some steps, the last among them; of a schedule that follows a score the first ones."""
    if isinstance(schedule, ReduceLROnPlateau):
        rates = [schedule.optimizer.param_groups[0]["lr"]]
        for score in (1.0, 1.0):
            schedule.step(score)
            rates.append(schedule.optimizer.param_groups[0]["lr"])
        return rates
    assert isinstance(schedule, LambdaLR), "all others are functions of the step"
    sampled = {*range(0, steps, max(1, steps // SAMPLED_STEPS)), steps - 1}
    return [float(schedule.base_lrs[0]) * schedule.lr_lambdas[0](step) for step in sorted(sampled)]


def _score(recipe: Recipe, task: TaskEvaluation | None) -> Iterator[str]:
    if recipe.evaluate is None or not follows_score(recipe.train, recipe.evaluate):
        return
    score = followed_score(recipe.train, None if task is None else task.key)
    if task is None or score in (LOSS, task.key, *(f"{task.key}_{name}" for name in task.questions.counts)):
        return
    groups = sorted({question.group for question in task.questions if question.group is not None})
    known = [LOSS, task.key, *(f"{task.key}_{name}" for name in (*task.questions.counts, *groups))]
    if score not in known:
        meant = nearest(score, known)
        said = f"did you mean {' or '.join(meant)}? " if meant else ""
        shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        yield f"train.metric_for_best_model: {score} is not measured; {said}The scores are {shown}"


def _batches(recipe: Recipe, steps: Steps, samples: int, processes: int) -> Iterator[str]:
    train = recipe.train
    if not steps.batches:
        on = f" on each of {processes:,} processes" if processes > 1 else ""
        yield (
            f"train.dataloader_drop_last: {samples:,} samples make no whole batch of "
            f"{train.per_device_train_batch_size:,}{on}, and every step would be dropped; lower "
            "train.per_device_train_batch_size, or remove it"
        )
    if recipe.evaluate is None:
        return
    epochs = steps.all / steps.epoch
    by_steps = train.eval_strategy == "steps"
    if train.eval_delay > (steps.all if by_steps else epochs):
        has = f"{steps.all:,} steps" if by_steps else f"{epochs:g} epochs"
        yield f"train.eval_delay: no evaluation would take place: the run has {has}; lower it"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
