"""`finetune evaluate`: a model, a task and its data -> replies, a score with its interval, and a page to look at.

    evaluate(Evaluation("runs/docvqa", find_task("docvqa"), (EvaluationSource("validation.parquet"),)))

Wrong data, folders and settings are reported before weights are loaded. Replies are written as they come; after an
interruption, the same call asks the remaining questions.
"""

import contextlib
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from finetune.evaluation.asked_models import Asking, EvaluatedModel, find_models, with_prompt_given
from finetune.evaluation.evaluated_model import default_folder, model_fingerprint
from finetune.evaluation.evaluation import Evaluation, EvaluationSource
from finetune.evaluation.page import write_evaluation_page
from finetune.evaluation.question_sample import QuestionPrompts, QuestionSample
from finetune.evaluation.questions import Questions
from finetune.evaluation.reply_progress import ReplyProgress
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
    record_of,
    score_records,
    submission,
    summary,
    unread_counts,
    with_scores,
    write_json,
)
from finetune.model.computing import choose_dtype, is_random, own_device
from finetune.recipe.sources import source_names
from finetune.replies.replies import Decoding, generate_replies, plan_replies, stop_ids_of, without_adapter
from finetune.run.environment import describe_environment
from finetune.terminal import Say, say
from qwenvl import ImageAccess, load_model, load_processor
from qwenvl.checkpoint.identity import BaseIdentity
from qwenvl.images.images import ImageError

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
    task = evaluation.task

    models = find_models(evaluation, say)
    questions = read_questions(evaluation, models, say)
    asked = questions[models[0].asking]
    folder = evaluation.out or default_folder(evaluation.model, task.name)
    bases: dict[Path, BaseIdentity] = {}
    files = [prediction_file(evaluation, folder, model, questions[model.asking], bases) for model in models]

    with hold_folder(folder):
        for file in files:
            file.check()
        earlier = read_results(folder)
        replies = [
            reply_to(evaluation, model, questions[model.asking], file, say)
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
    return folder


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
        "data": {"questions": len(questions), "fingerprint": questions.fingerprint()},
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


@dataclass(frozen=True)
class Replies:
    """The replies of one model.

    Attributes:
        records: one for each question, in their order, without scores.
        speed: of the replies that were generated now; None where all were there already.
        notes: what a reader of the numbers should know about the model.
    """

    records: list[Record]
    speed: dict[str, float] | None = None
    notes: tuple[str, ...] = ()


def reply_to(
    evaluation: Evaluation, model: EvaluatedModel, questions: QuestionSample, file: PredictionFile, say: Say
) -> Replies:
    """The replies to all questions: those that are in the file, and new ones, which are added to it as they come.

    Raises:
        ImageError: an image cannot be read, and that is refused.
        Failed: the device's memory does not hold a single prompt.
    """
    kept = file.open()
    numbers = [number for number in range(len(questions)) if number not in kept]
    if kept:
        say("resume", f"{len(kept):,} of {len(questions):,} replies of {model.name} are there")
    new = generate(evaluation, model, questions, numbers, file) if numbers else Replies([])
    # The next model may need the memory of this one.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    records = kept | {record["number"]: record for record in new.records}
    return replace(new, records=[records[number] for number in range(len(questions))])


def generate(
    evaluation: Evaluation,
    model: EvaluatedModel,
    questions: QuestionSample,
    numbers: Sequence[int],
    file: PredictionFile,
) -> Replies:
    """Load the model and reply to the questions with these numbers."""
    task = evaluation.task
    source = model.use.source
    processor = load_processor(source.base)
    tokenizer = processor.tokenizer
    prompts = QuestionPrompts(questions, numbers, tokenizer, processor.n_queries)
    with ReplyProgress("reading questions", len(numbers)) as progress:
        plan = plan_replies(prompts, progress.reached)
    loaded = load_model(
        source.base,
        adapter=source.adapter,
        dtype=choose_dtype(evaluation.dtype),
        quantization=model.use.quantization,
        quantize=model.use.quantize,
        device_map=own_device() if torch.cuda.is_available() else None,
    )
    notes = []
    if is_random(without_adapter(loaded)):
        notes.append(f"{model.name} has random weights: it shows that evaluation works, not that it reads.")
    trained_up_to = without_adapter(loaded).config.seq_length
    if beyond := sum(length > trained_up_to for length in plan.lengths):
        views = model.asking.views
        cost = "" if views is None else f"; each image is {views.count} pictures (--views)"
        notes.append(
            f"{beyond:,} prompts of {model.name} are longer than the {trained_up_to:,} tokens that it was trained on "
            f"(seq_length), up to {max(plan.lengths):,}: replies to them may be worse{cost}."
        )
    stop_texts = task.stop if model.style == "base" else ()
    decoding = Decoding(
        task.max_new_tokens,
        # The published scripts end replies of chat models too at <|endoftext|> alone.
        (tokenizer.eod_id,) if task.published else stop_ids_of(loaded, tokenizer, model.style),
        tuple(text for text in stop_texts if text not in tokenizer.control_tokens),
        batch_tokens=evaluation.batch_tokens,
        min_new_tokens=task.min_new_tokens,
    )
    records = []
    started = time.monotonic()
    with ReplyProgress(f"{task.name}, {model.name}", len(numbers)) as progress, _naming_the_way_on():
        for reply in generate_replies(
            loaded,
            prompts,
            plan,
            tokenizer,
            processor.image_processor,
            decoding,
            on_bad_image=evaluation.on_bad_image,
        ):
            number = numbers[reply.index]
            records.append(record_of(task, number, questions[number], reply))
            file.append(records[-1:])
            progress.reached(len(records))
    seconds = time.monotonic() - started
    speed = {
        "replies": len(records),
        "seconds": round(seconds, 2),
        "examples_per_second": round(len(records) / max(seconds, 1e-9), 3),
    }
    return Replies(records, speed, tuple(notes))


@contextlib.contextmanager
def _naming_the_way_on() -> Iterator[None]:
    """Raises:
    ImageError: as within, with what else can be done than to mend the image.
    """
    try:
        yield
    except ImageError as error:
        remedy = (
            f"{error.remedy}. The replies so far are kept. --bad-image wrong counts the questions on such images as "
            "wrong and lists them"
        )
        raise ImageError(error.image, error.reason, remedy) from error


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
