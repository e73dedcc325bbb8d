"""The data of a run: samples to train on, samples to evaluate, and the questions of a task."""

from collections.abc import Mapping
from dataclasses import dataclass

from finetune.data.checking import Checked
from finetune.data.reading import look_for_overlap, read_checked
from finetune.data.samples import Samples
from finetune.data.summary import describe_data
from finetune.evaluation.task_evaluation import TaskEvaluation
from finetune.recipe import Recipe
from finetune.terminal import Say
from qwenvl import QwenVLProcessor


@dataclass(frozen=True)
class TrainingData:
    """What a run reads.

    Attributes:
        samples: for "train" and, where there is evaluation, "eval".
        checked: what the check found in each of them: lengths, labels, rows left out.
        task: scores replies; None where the loss is all that is evaluated.
    """

    samples: Mapping[str, Samples]
    checked: Mapping[str, Checked]
    task: TaskEvaluation | None


def read_data(recipe: Recipe, processor: QwenVLProcessor, say: Say, *, show_progress: bool) -> TrainingData:
    """Read and check all data of a recipe.

    Raises:
        InputError: rows that cannot be trained on, or a task that cannot be asked.
    """
    parts = read_checked(recipe, processor, show_progress=show_progress)
    for name, (_, checked) in parts.items():
        say(f"{name} data", describe_data(checked))
    for number, line in enumerate(look_for_overlap(recipe, parts)):
        say("" if number else "overlap", line)
    task = None
    if recipe.evaluate is not None and recipe.evaluate.task is not None:
        task = TaskEvaluation(recipe, processor)
        say("eval task", task)
    return TrainingData(
        samples={name: samples for name, (samples, _) in parts.items()},
        checked={name: checked for name, (_, checked) in parts.items()},
        task=task,
    )
