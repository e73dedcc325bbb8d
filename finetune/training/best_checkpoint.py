"""The best evaluation so far: its checkpoint is kept, and a number of evaluations without a better one stops training.

Both count the evaluations in the trainer's log, which is part of each checkpoint: a resumed run decides like an
uninterrupted one, and all processes decide alike.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def metric_key(metric: str) -> str:
    """The logged key of a `metric_for_best_model`."""
    return f"eval_{metric.removeprefix('eval_')}"


def is_new_best(
    log_history: Sequence[Mapping[str, Any]], step: int, best_step: int | None, metric: str, *, greater_is_better: bool
) -> bool:
    """Whether the evaluation of a step is better than the best so far: by the metric; if that is equal, by a lower
    evaluation loss; if that is equal too, it is, for it is trained longer.

    Args:
        log_history: the trainer's.
        best_step: the step of the best so far; None where there is none.
        metric: the logged key.

    Returns:
        False where the metric is no number.
    """
    new, best = (_evaluation_of(log_history, one, metric) for one in (step, best_step))
    if new is None or math.isnan(new[metric]):
        return False
    if best is None:
        return True
    sign = 1 if greater_is_better else -1
    return (sign * new[metric], -_loss_of(new)) >= (sign * best[metric], -_loss_of(best))


def describe_ties(log_history: Sequence[Mapping[str, Any]], best_step: int, metric: str) -> str:
    """`, tied with step 15: the lower eval_loss`; empty where no other evaluation has the best's value."""
    best = _evaluation_of(log_history, best_step, metric)
    if best is None:
        return ""
    tied = {record["step"]: record for record in log_history if record.get(metric) == best[metric]}
    others = sorted(step for step in tied if step not in (0, best_step))
    if not others:
        return ""
    by_loss = any(_loss_of(tied[step]) != _loss_of(best) for step in others)
    shown = ", ".join([*map(str, others[:3]), *(["..."] if len(others) > 3 else [])])
    return f", tied with step{'s' if len(others) > 1 else ''} {shown}: the {'lower eval_loss' if by_loss else 'later'}"


def _evaluation_of(
    log_history: Sequence[Mapping[str, Any]], step: int | None, metric: str
) -> Mapping[str, Any] | None:
    """The last evaluation at a step; None where there was none."""
    return next((one for one in reversed(log_history) if one.get("step") == step and metric in one), None)


def _loss_of(record: Mapping[str, Any]) -> float:
    loss = record.get("eval_loss", math.nan)
    return math.inf if math.isnan(loss) else loss


def step_is_best(args: TrainingArguments, state: TrainerState) -> bool:
    """`is_new_best` of the step that was just evaluated."""
    assert args.metric_for_best_model is not None, "trainer_arguments sets it"
    return is_new_best(
        state.log_history,
        state.global_step,
        state.best_global_step,
        metric_key(args.metric_for_best_model),
        greater_is_better=bool(args.greater_is_better),
    )


class SaveBest(TrainerCallback):
    """Saves a checkpoint at each evaluation that is the best so far."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if step_is_best(args, state):
            control.should_save = True
        return control


class Patience(TrainerCallback):
    """Stops after a number of evaluations without a better `metric_for_best_model`; one that is equal is no better.

    Args:
        evaluations: counted from the first of the best so far.
    """

    def __init__(self, evaluations: int):
        self.evaluations = evaluations

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        # A run that was killed after its last evaluation has nothing more to train.
        return self.on_evaluate(args, state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        since = evaluations_since_best(_values(args, state), greater_is_better=bool(args.greater_is_better))
        if since >= self.evaluations:
            control.should_training_stop = True
        return control


def _values(args: TrainingArguments, state: TrainerState) -> list[float]:
    """The scores of the evaluations so far. One before the first step is none of them: it has no checkpoint."""
    key = args.metric_for_best_model
    assert key is not None, "trainer_arguments sets it"
    return [record[key] for record in state.log_history if key in record and record.get("step", 0) > 0]


def evaluations_since_best(values: list[float], *, greater_is_better: bool) -> int:
    """Count the values after the first of the best ones; NaN is never better."""
    best: float | None = None
    since = 0
    for value in values:
        is_better = value == value and (best is None or (value > best if greater_is_better else value < best))
        best, since = (value, 0) if is_better else (best, since + 1)
    return since
