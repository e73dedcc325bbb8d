"""`finetune evaluate`: a model, a task and its data -> replies, a score with its interval, and a page to look at.

    evaluate(Evaluation("runs/docvqa", find_task("docvqa"), (EvaluationSource("validation.parquet"),)))

Wrong data, folders and settings are reported before weights are loaded. Replies are written as they come; after an
interruption, the same call asks the remaining questions. The processes of a launcher share the questions out.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from finetune.evaluation.asked_models import Asking, EvaluatedModel, find_models, with_prompt_given
from finetune.evaluation.evaluated_model import default_folder, model_fingerprint
from finetune.evaluation.evaluation import Evaluation, EvaluationSource
from finetune.evaluation.model_replies import Replies, free_memory, generate, reply_to
from finetune.evaluation.page import write_evaluation_page
from finetune.evaluation.question_sample import QuestionSample
from finetune.evaluation.questions import Questions
from finetune.evaluation.results import (
    COMPARED,
    PREDICTIONS,
    RESULTS,
    SUBMISSION,
    PredictionFile,
    Record,
    Scored,
    compare_scored,
    cut_count,
    hold_folder,
    read_results,
    score_records,
    submission,
    summary,
    unread_counts,
    with_scores,
    write_json,
)
from finetune.evaluation.shared_replies import hear_numbers
from finetune.model.computing import choose_dtype
from finetune.recipe.sources import source_names
from finetune.run.environment import describe_environment
from finetune.run.meeting import Meeting, meeting_of
from finetune.terminal import Say, say, say_nothing
from qwenvl import ImageAccess
from qwenvl.checkpoint.identity import BaseIdentity

__all__ = ["Evaluation", "EvaluationSource", "evaluate"]


def evaluate(evaluation: Evaluation, say: Say = say) -> Path:
    """Ask, score and report; or continue an evaluation that was interrupted.

    Args:
        evaluation: what to ask which model.
        say: prints a labelled line.

    Returns:
        The folder with the results; `results` lists its files.

    Raises:
        InputError: the model, the data, the folder or a setting is wrong; found before weights are loaded, except for
            damaged images.
        RunLocked: another process holds the folder.
        Failed: the device's memory does not hold a single prompt.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    evaluation = with_prompt_given(evaluation)
    folder = evaluation.out or default_folder(evaluation.model, evaluation.task.name)
    with meeting_of("evaluate") as meeting:
        if meeting is None or meeting.is_main:
            _evaluate(evaluation, folder, meeting, say)
        else:
            _help(evaluation, meeting)
    return folder


def _evaluate(evaluation: Evaluation, folder: Path, meeting: Meeting | None, say: Say) -> None:
    """The whole of it, with replies of other processes where there are some."""
    task = evaluation.task
    models = find_models(evaluation, say)
    questions = read_questions(evaluation, models, say)
    asked = questions[models[0].asking]
    bases: dict[Path, BaseIdentity] = {}
    files = [prediction_file(evaluation, folder, model, questions[model.asking], bases) for model in models]

    with hold_folder(folder):
        for file in files:
            file.check()
        earlier = read_results(folder)
        replies = [
            reply_to(evaluation, model, questions[model.asking], file, meeting, say)
            for model, file in zip(models, files, strict=True)
        ]
        results = describe(evaluation, asked, files[0].identity, models[0].prompt.said, replies, earlier)
        records = [one.records for one in replies]
        if asked.answered:
            scores = [
                score_records(task, questions[model.asking], own) for model, own in zip(models, records, strict=True)
            ]
            results |= score_summary(evaluation, records, scores)
            records = [with_scores(own, scored) for own, scored in zip(records, scores, strict=True)]
        else:
            write_json(folder / SUBMISSION, submission(task, records[0]), indent=1)
            results["submission"] = SUBMISSION
        for file, own in zip(files, records, strict=True):
            file.write(own)
        write_json(folder / RESULTS, results)
        page = write_evaluation_page(folder, results, asked, *records)
        for label, text in summary(results):
            say(label, text)
        say("replies", folder / PREDICTIONS)
        say("results", folder / RESULTS)
        say("page", page)


def _help(evaluation: Evaluation, meeting: Meeting) -> None:
    """Reply to this process's share of the questions for the main one, which writes."""
    models = find_models(evaluation, say_nothing)
    questions = read_questions(evaluation, models, say_nothing)
    # One process of each machine reads all of a model.
    reads_model = os.environ.get("LOCAL_RANK", "0") == "0"
    bases: dict[Path, BaseIdentity] = {}
    for model in models:
        asked = questions[model.asking]
        fingerprint = model_fingerprint(model.use.source, bases) if reads_model else None
        numbers = hear_numbers(meeting, model.role, data_identity(asked), fingerprint)
        if numbers:
            generate(evaluation, model, asked, numbers, None, meeting)
            free_memory()


def read_questions(evaluation: Evaluation, models: Sequence[EvaluatedModel], say: Say) -> dict[Asking, QuestionSample]:
    """The questions as each model is asked; they differ in their prompts alone.

    Raises:
        UserError: rows that cannot be asked, or a source that cannot be read.
    """
    root = evaluation.images_root
    samples: dict[Asking, QuestionSample] = {}
    for asking in dict.fromkeys(model.asking for model in models):
        parts = [
            Questions(
                source,
                evaluation.task,
                prompt=asking.prompt,
                system=asking.system,
                images_root=root,
                access=ImageAccess(root=None if root is None else Path(root), allow_urls=evaluation.allow_urls),
                style=asking.style,
                shots=evaluation.shots,
                shot_source=evaluation.shots_from,
                grounding=asking.grounding,
                box_edge=evaluation.box_edge,
                on_bad_row=evaluation.on_bad_row,
                ignore=evaluation.ignore,
                markup_as_text=evaluation.markup_as_text,
                # With "wrong", a missing image counts as wrong, like a damaged one.
                look_for_images=evaluation.on_bad_image == "refuse",
                pages=evaluation.pages,
                views=asking.views,
            )
            for source in evaluation.sources
        ]
        samples[asking] = QuestionSample(
            parts,
            names=source_names(evaluation.sources),
            limit=evaluation.limit,
            sample=evaluation.sample,
            seed=evaluation.seed,
        )
        for source, part in zip(evaluation.sources, parts, strict=True):
            for note in part.notes if len(samples) == 1 else ():
                say("data", f"{source.path}: {note}")
    first = samples[models[0].asking]
    say("task", f"{evaluation.task.name}: {evaluation.task.metric} on {first}")
    if evaluation.shots:
        where = evaluation.shots_from.path if evaluation.shots_from is not None else "the same data"
        say(
            "examples",
            f"{evaluation.shots} solved ones before each question, from {where}, of other images and documents",
        )
    if first.problems:
        say("left out", f"{len(first.problems):,} rows that cannot be asked; {RESULTS} lists them")
    return samples


def prediction_file(
    evaluation: Evaluation,
    folder: Path,
    model: EvaluatedModel,
    questions: QuestionSample,
    bases: dict[Path, BaseIdentity],
) -> PredictionFile:
    """The file for the replies of a model, with what must be the same for replies to belong together.

    Args:
        bases: see `model_fingerprint`.
    """
    task = evaluation.task
    identity = {
        "model": model_fingerprint(model.use.source, bases),
        "task": {
            "name": task.name,
            "metric": task.metric,
            "max_new_tokens": task.max_new_tokens,
            "stop": task.stop,
            "published": task.published,
        },
        "data": data_identity(questions),
        "settings": {
            "style": model.style,
            "prompt": model.prompt.text,
            "system": model.asking.system,
            # Only where there are some: earlier evaluations know no views.
            **({} if model.asking.views is None else {"views": model.asking.views.to_json()}),
            "shots": evaluation.shots,
            "dtype": choose_dtype(evaluation.dtype),
            "quantization": model.use.quantization,
            "quantize": list(model.use.quantized),
        },
    }
    return PredictionFile(folder / COMPARED if model.role == "compared" else folder, identity)


def data_identity(questions: QuestionSample) -> dict[str, Any]:
    """What must be the same of the questions."""
    return {"questions": len(questions), "fingerprint": questions.fingerprint()}


def describe(
    evaluation: Evaluation,
    questions: QuestionSample,
    identity: Mapping[str, Any],
    asked_by: str,
    replies: Sequence[Replies],
    earlier: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All of `results.json` but the scores.

    Args:
        evaluation: what was asked.
        questions, identity: of the model.
        asked_by: by which prompt, in words.
        replies: of the model and of the one it is compared with.
        earlier: `results.json` of the same evaluation, finished before: the speed of replies that were there already,
            and its notes. None where there is none.
    """
    notes = [note for one in replies for note in one.notes]
    notes += evaluation.task.notes(questions)
    if questions.pages_left_out:
        notes.append(f"{questions.pages_left_out:,} pages beyond data.pages.first are not shown to the model")
    return {
        "model": evaluation.model,
        "task": evaluation.task.name,
        "metric": evaluation.task.metric,
        "data": [source.path for source in evaluation.sources],
        "questions": len(questions),
        "of": questions.total,
        "unreadable": [
            {key: record[key] for key in ("id", "origin", "unreadable")}
            for record in replies[0].records
            if "unreadable" in record
        ],
        "unread": unread_counts(replies[0].records),
        "cut": cut_count(replies[0].records),
        "left_out": [str(problem) for problem in questions.problems],
        "notes": notes if earlier is None else list(dict.fromkeys([*earlier["notes"], *notes])),
        "settings": {
            "style": identity["settings"]["style"],
            "prompt": identity["settings"]["prompt"],
            "asked": asked_by,
            **({"views": views} if (views := identity["settings"].get("views")) else {}),
            "max_new_tokens": evaluation.task.max_new_tokens,
            "shots": evaluation.shots,
            "limit": evaluation.limit,
            "sample": evaluation.sample,
            "seed": evaluation.seed,
            "batch_tokens": evaluation.batch_tokens,
            "dtype": choose_dtype(evaluation.dtype),
            "quantization": identity["settings"]["quantization"],
        },
        "speed": replies[0].speed or (earlier and earlier["speed"]),
        "identity": identity,
        "environment": describe_environment(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"),
    }


def score_summary(
    evaluation: Evaluation, records: Sequence[Sequence[Record]], scores: Sequence[Scored]
) -> dict[str, Any]:
    """The scores in `results.json`, of the model and of the one it is compared with."""
    ours, *others = scores
    found = ours.summary()
    if others:
        difference = compare_scored(evaluation.task, records[0], ours, others[0], records[1])
        found["compared"] = {
            "model": evaluation.compare,
            **others[0].summary(),
            **difference,
            "unread": unread_counts(records[1]),
            "cut": cut_count(records[1]),
        }
    return found
