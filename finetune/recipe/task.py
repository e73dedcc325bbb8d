"""The task that a recipe's `evaluate` section names, for training and for `finetune evaluate --recipe`."""

from dataclasses import replace

from finetune.evaluation.tasks import Task, custom_task, find_task
from finetune.recipe.sections import Evaluate


def task_of(evaluate: Evaluate) -> Task:
    """The task, with the section's `max_new_tokens`.

    Raises:
        UserError: a metric that does not go with the format of the data.
    """
    if evaluate.task is None:
        raise ValueError("the evaluate section names no task: set evaluate.task")
    if evaluate.task == "custom":
        return custom_task(evaluate.metric, max_new_tokens=evaluate.max_new_tokens, format=evaluate.data[0].format)
    return replace(find_task(evaluate.task), max_new_tokens=evaluate.max_new_tokens)
