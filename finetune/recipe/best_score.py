"""By which score a run picks its best checkpoint, stops early or lowers its learning rate, and in which direction."""

from finetune.recipe.sections import Evaluate
from finetune.recipe.train_checks import BY_SCORE
from finetune.recipe.train_section import Train

LOSS = "eval_loss"


def evaluates_when(train: Train, evaluate: Evaluate | None) -> str:
    """`eval_strategy` as it comes to be: with an evaluate section once an epoch, unless the recipe says otherwise."""
    return train.eval_strategy if evaluate is None or "eval_strategy" in train.model_fields_set else "epoch"


def keeps_best(train: Train, evaluate: Evaluate | None) -> bool:
    """Whether the result is the best checkpoint and not the last: where the recipe says so, or where it says nothing
    and evaluates a task or has patience.
    """
    if evaluate is None or evaluates_when(train, evaluate) == "no":
        return False
    if "load_best_model_at_end" in train.model_fields_set:
        return train.load_best_model_at_end
    return evaluate.task is not None or evaluate.patience is not None


def follows_score(train: Train, evaluate: Evaluate | None) -> bool:
    """Whether anything goes by the score of an evaluation."""
    if evaluate is None or evaluates_when(train, evaluate) == "no":
        return False
    return keeps_best(train, evaluate) or evaluate.patience is not None or train.lr_scheduler_type in BY_SCORE


def followed_score(train: Train, task_score: str | None) -> str:
    """The logged key of that score, `eval_loss` or `eval_anls`.

    Args:
        task_score: of the task that is evaluated; None where there is none.
    """
    named = train.metric_for_best_model
    if named is None:
        return task_score or LOSS
    return f"eval_{named.removeprefix('eval_')}"


def higher_is_better(score: str) -> bool:
    """Whether a logged score is better when it is higher: all are but the loss."""
    return score != LOSS
