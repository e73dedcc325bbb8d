"""Early stopping that a resumed run decides as an uninterrupted one."""

from transformers import TrainerCallback


class Patience(TrainerCallback):
    """Stops after so many evaluations in a row without a better `metric_for_best_model`.

    Transformers' own counts in memory, and begins anew in a run that goes on from a checkpoint. This one counts the
    evaluations in the trainer's log, which the checkpoint holds; every process has the same.

    Args:
        evaluations: in a row; counted from the best so far.
    """

    def __init__(self, evaluations: int):
        self.evaluations = evaluations

    def on_evaluate(self, args, state, control, **kwargs):
        key = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        values = [record[key] for record in state.log_history if key in record]
        if evaluations_since_best(values, greater_is_better=args.greater_is_better) >= self.evaluations:
            control.should_training_stop = True
        return control


def evaluations_since_best(values: list[float], *, greater_is_better: bool) -> int:
    """How many of the values come after the first of the best ones; NaN is never better."""
    best, since = None, 0
    for value in values:
        is_better = value == value and (best is None or (value > best if greater_is_better else value < best))
        best, since = (value, 0) if is_better else (best, since + 1)
    return since
