"""The data of a run: samples to train on, samples to evaluate, and the questions of a task."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune.data.checks.checked import Checked
from finetune.data.places import Aligned, Places, align, as_they_were, load_places, places_of
from finetune.data.reading import look_for_overlap, read_checked, rules_of
from finetune.data.samples import Samples
from finetune.data.summary import describe_data, describe_long, describe_sources, describe_train_on
from finetune.evaluation.task_evaluation import TaskEvaluation
from finetune.recipe import Recipe
from finetune.run.folder import RunFolder
from finetune.run.left_out import LEFT_OUT, read_left_out
from finetune.terminal import Say, terminal_line
from qwenvl import QwenVLProcessor

PLACES = "places"
"""Entry of run.json: the run folder has the places of its rows."""

WEIGHTS = "weights"
"""Key of run.json: whether samples are drawn by the weights of their sources in each epoch or once for all."""
EACH_EPOCH, ONCE = "each epoch", "once"


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


def read_data(
    recipe: Recipe, processor: QwenVLProcessor, say: Say, *, show_progress: bool, seq_length: int = 2048
) -> TrainingData:
    """Read and check all data of a recipe.

    Args:
        processor: of the model.
        say: prints a labelled line.
        show_progress: see `checking.look_at`.
        seq_length: tokens that the model was made for, by its configuration.

    Raises:
        InputError: rows that cannot be trained on, or a task that cannot be asked.
    """
    opens_images = os.environ.get("LOCAL_RANK", "0") == "0"
    parts = read_checked(recipe, processor, show_progress=show_progress, opens_images=opens_images, say=say)
    for name, (samples, checked) in parts.items():
        say(f"{name} data", describe_data(checked))
        pages = recipe.data.pages is not None
        if long := describe_long(checked, rules_of(recipe, processor), seq_length, pages=pages):
            say("", long)
        if name == "train" and (said := describe_train_on(recipe.data)):
            say("", said)
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


@dataclass(frozen=True)
class RowPlaces:
    """The places of the rows of a run.

    Attributes:
        now: of each part of the data, as it is.
        then: as it was when the run began; empty where no run began, or an older version began it.
        aligned: of the parts that are in both, where the rows of then are now.
    """

    now: dict[str, Places]
    then: dict[str, Places]
    aligned: dict[str, Aligned]


def find_places(
    data: TrainingData, fingerprints: Mapping[str, str], run: RunFolder, stored: Mapping[str, Any] | None
) -> RowPlaces:
    """Where the rows of the run that is in the folder are now.

    Args:
        fingerprints: of the parts of the data.
        stored: what run.json says; None where there is none.

    Raises:
        UserError: the run's file of rows is damaged or gone.
    """
    now = {name: places_of(data.samples[name], data.checked[name], fingerprints[name]) for name in data.samples}
    if stored is None or not stored.get(PLACES):
        return RowPlaces(now, {}, {})
    then = load_places(run.rows_file)
    left_out = read_left_out(run.path / LEFT_OUT)
    aligned = {
        name: align(then[name], now[name], data.samples[name], left_out.get(name, {})) for name in now if name in then
    }
    if data.task is not None and "eval" in aligned:
        part = aligned["eval"]
        if len(now["eval"].digests) != len(then["eval"].digests) or part.gone or part.waiting:
            reason = "rows came or went, so that its task would ask other questions"
            aligned["eval"] = replace(part, changes=[*part.changes, reason])
    return RowPlaces(now, then, aligned)


def data_as_it_was(data: TrainingData, places: RowPlaces) -> TrainingData:
    """The data of a run that goes on, by the numbers that its rows had when it began."""
    samples, checked = dict(data.samples), dict(data.checked)
    for name, aligned in places.aligned.items():
        samples[name], checked[name] = as_they_were(samples[name], checked[name], places.then[name], aligned)
    return replace(data, samples=samples, checked=checked)
