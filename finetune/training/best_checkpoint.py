"""The best evaluation so far: its checkpoint is kept for the end, and so many without a better one stop the training.

Both count the evaluations in the trainer's log, which checkpoints hold: a resumed run decides as an uninterrupted one,
and every process has the same.
"""

from transformers import TrainerCallback, TrainerState
from trl import SFTConfig


def pick_best(arguments: SFTConfig, metric: str):
    """Make the best checkpoint by `metric` (as logged) the result, unless the arguments say what is.

    With `SaveBest`, whatever else is saved when: Transformers' own way saves at evaluations only.
    """
    if arguments.metric_for_best_model is None:
        arguments.metric_for_best_model = metric
    if arguments.greater_is_better is None:
        arguments.greater_is_better = not arguments.metric_for_best_model.endswith("loss")
    arguments.load_best_model_at_end = True


class SaveBest(TrainerCallback):
    """Saves a checkpoint at each evaluation that is better than all before."""

    def on_evaluate(self, args, state, control, **kwargs):
        values = _values(args, state)
        if values and evaluations_since_best(values, greater_is_better=args.greater_is_better) == 0:
            control.should_save = True
        return control


class Patience(TrainerCallback):
    """Stops after so many evaluations in a row without a better `metric_for_best_model`.

    Args:
        evaluations: in a row; counted from the best so far.
    """

    def __init__(self, evaluations: int):
        self.evaluations = evaluations

    def on_evaluate(self, args, state, control, **kwargs):
        since = evaluations_since_best(_values(args, state), greater_is_better=args.greater_is_better)
        if since >= self.evaluations:
            control.should_training_stop = True
        return control


def _values(args: SFTConfig, state: TrainerState) -> list[float]:
    key = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    return [record[key] for record in state.log_history if key in record]


def evaluations_since_best(values: list[float], *, greater_is_better: bool) -> int:
    """How many of the values come after the first of the best ones; NaN is never better."""
    best, since = None, 0
    for value in values:
        is_better = value == value and (best is None or (value > best if greater_is_better else value < best))
        best, since = (value, 0) if is_better else (best, since + 1)
    return since
