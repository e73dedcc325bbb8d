"""Examples for the page: rows of a run's evaluation data, with their answers and the replies that the run recorded."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.formats.row_format import PROMPTS
from finetune.demo.pictures import ACCESS, THUMBNAIL, small_copy
from finetune.errors import UserError
from finetune.evaluation.evaluated_model import EVALUATIONS
from finetune.evaluation.predictions import PREDICTIONS
from finetune.evaluation.tasks import task_of
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.sources import source_names
from finetune.replies.prompt_template import PLACEHOLDERS
from finetune.report.predictions import Row, pair_rows
from qwenvl import load_image
from qwenvl.checkpoint.record import ModelRecord
from qwenvl.images.images import ImageError

MOST_EXAMPLES = 24

Recorded = tuple[str, str]
"""When a reply was recorded, in words, and the reply."""


@dataclass(frozen=True)
class Example:
    """A row of the evaluation data.

    Attributes:
        origin: its file and row.
        question: what the user says, without the prompt around it.
        template: the prompt that the run asked it by, with a place for the question; None where it was asked as it is.
        images: the run's small copies of its images, at least one.
        thumbnail: a smaller one of the first, in the folder of the page's files.
        answers: the right ones.
        recorded: the replies that were recorded.
    """

    origin: str
    question: str
    template: str | None
    images: tuple[Path, ...]
    thumbnail: Path
    answers: tuple[str, ...]
    recorded: tuple[Recorded, ...]


def find_run(model: str) -> Path | None:
    """The run folder that a model is, or is the result of; None where it is of no run."""
    path = Path(model)
    candidates = [path, path.resolve().parent] if path.is_dir() else []
    return next((folder for folder in candidates if (folder / "run.json").is_file()), None)


def read_examples(run: Path, record: ModelRecord, folder: Path) -> list[Example]:
    """The rows whose replies the run recorded, at most `MOST_EXAMPLES`; none where it recorded none.

    Rows without images, or whose images are gone, and rows that were asked by a prompt which takes more than a
    question, are left out.

    Args:
        run: the run's folder.
        record: of the model.
        folder: of the page's files.

    Raises:
        UserError: a file of the run is damaged.
    """
    rows = pair_rows(_read_lines(run / PREDICTIONS))
    later = _later_replies(run)
    recipe = load_recipe(run / "recipe.yaml") if rows and (run / "recipe.yaml").is_file() else None
    examples = []
    for row in rows:
        images = tuple(run / name for name in row.images)
        question, template = _asked(row, recipe, record)
        takes_more = template is not None and not _only_question(template)
        if takes_more or not question.strip() or not images or not all(_is_inside(image, run) for image in images):
            continue
        replies = [(f"{when} training", row.replies[when]) for when in ("before", "after") if when in row.replies]
        replies += later.get((row.origin, row.question), [])
        try:
            thumbnail = small_copy(load_image(images[0], access=ACCESS), folder, THUMBNAIL)
        except ImageError:
            continue
        answers = (row.target, *row.others)
        examples.append(Example(row.origin, question, template, images, thumbnail, answers, tuple(replies)))
        if len(examples) == MOST_EXAMPLES:
            break
    return examples


def _asked(row: Row, recipe: Recipe | None, record: ModelRecord) -> tuple[str, str | None]:
    """The question of a row by itself, and the prompt that it was asked by."""
    if not row.metric:
        return _taken_out(row.question, record.templates)
    if recipe is None or recipe.evaluate is None:
        return row.question, record.only_prompt
    task = task_of(recipe.evaluate)
    sources = recipe.evaluate.data
    names = source_names(sources)
    source = sources[names.index(row.source)] if row.source in names else sources[0]
    template = source.prompt or task.chat_prompt
    # Conversations bring what the user says, and a question may be its own prompt: "Describe the image".
    return row.question, template if task.format in PROMPTS and template != row.question else None


def _taken_out(text: str, templates: Sequence[str]) -> tuple[str, str | None]:
    """The question in a whole message, and the template that it was put into; the message itself without one."""
    for template in templates:
        for placeholder in PLACEHOLDERS:
            before, found, after = template.partition(placeholder)
            long_enough = len(text) >= len(before) + len(after)
            if found and long_enough and text.startswith(before) and text.endswith(after):
                return text[len(before) : len(text) - len(after)], template
    return text, None


def _only_question(template: str) -> bool:
    """Whether a template takes a question, and nothing else such as options."""
    return any(placeholder in template for placeholder in PLACEHOLDERS) and not any(
        other in template for other in ("{options}", "{hint}")
    )


def _is_inside(file: Path, run: Path) -> bool:
    """Whether a file is there, in the run's folder: `predictions.jsonl` may be of somebody else."""
    return file.is_file() and file.resolve().is_relative_to(run.resolve())


def _later_replies(run: Path) -> dict[tuple[str, str], list[Recorded]]:
    """The replies of `finetune evaluate` in the run's folder, by file and row and question."""
    replies: dict[tuple[str, str], list[Recorded]] = {}
    for file in sorted((run / EVALUATIONS).glob(f"*/{PREDICTIONS}")):
        for record in _read_lines(file):
            key = str(record.get("origin")), str(record.get("question"))
            replies.setdefault(key, []).append((f"by finetune evaluate, {file.parent.name}", str(record.get("reply"))))
    return replies


def _read_lines(file: Path) -> list[Mapping[str, Any]]:
    if not file.is_file():
        return []
    records: list[Mapping[str, Any]] = []
    # At \n only: strings may hold other line separators.
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{file}, line {number}: is damaged; delete the line")
        records.append(record)
    return records
