"""The data of a run: samples to train on, samples to evaluate, and the questions of a task."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from finetune.data.checking import Checked
from finetune.data.reading import look_for_overlap, read_checked
from finetune.data.samples import Samples
from finetune.data.summary import describe_data, describe_sources
from finetune.evaluation.task_evaluation import TaskEvaluation
from finetune.recipe import Recipe
from finetune.terminal import Say, terminal_line
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

    def drawn_once(self) -> "TrainingData":
        """The same data for a run that draws by the weights once for all epochs, as it began."""
        train = replace(self.checked["train"], redraws=False)
        return replace(self, checked={**self.checked, "train": train})


def read_data(recipe: Recipe, processor: QwenVLProcessor, say: Say, *, show_progress: bool) -> TrainingData:
    """Read and check all data of a recipe.

    Raises:
        InputError: rows that cannot be trained on, or a task that cannot be asked.
    """
    parts = read_checked(recipe, processor, show_progress=show_progress)
    for name, (samples, checked) in parts.items():
        say(f"{name} data", describe_data(checked))
        if name == "train" and any(source.weight != 1 for source in recipe.data.train):
            for line in describe_sources(recipe.data.train, samples, checked, recipe.seed):
                say("", terminal_line(line))
        for note in samples.notes:
            say("", note)
    for number, line in enumerate(look_for_overlap(recipe, parts)):
        say("" if number else "overlap", line)
    task = None
    if recipe.evaluate is not None and recipe.evaluate.task is not None:
        task = TaskEvaluation(recipe, processor, parts["train"][1].system)
        say("eval task", task)
    return TrainingData(
        samples={name: samples for name, (samples, _) in parts.items()},
        checked={name: checked for name, (_, checked) in parts.items()},
        task=task,
    )
