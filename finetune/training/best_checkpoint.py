"""The best evaluation so far: its checkpoint is kept, and a number of evaluations without a better one stops training.

Both count the evaluations in the trainer's log, which is part of each checkpoint: a resumed run decides like an
uninterrupted one, and all processes decide alike.
"""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class SaveBest(TrainerCallback):
    """Saves a checkpoint at each evaluation that is better than all before.

    With it `save_steps` can be anything; Transformers alone would need it to be a multiple of `eval_steps`.
    """

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        values = _values(args, state)
        if values and evaluations_since_best(values, greater_is_better=bool(args.greater_is_better)) == 0:
            control.should_save = True
        return control


class Patience(TrainerCallback):
    """Stops after a number of evaluations without a better `metric_for_best_model`.

    Args:
        evaluations: counted from the best so far.
    """

    def __init__(self, evaluations: int):
        self.evaluations = evaluations

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
