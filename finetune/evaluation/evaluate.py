"""`finetune evaluate`: a model, a task and its data -> replies, a score with its interval, and a page to look at.

    evaluate(Evaluation("runs/docvqa", find_task("docvqa"), (EvaluationSource("validation.parquet"),)))

Wrong data, folders and settings are reported before weights are loaded. Replies are written as they come; after an
interruption, the same call asks the remaining questions.
"""

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import logging as transformers_logging

from finetune.batches.budget import REPLY_BATCH_TOKENS
from finetune.errors import UserError
from finetune.evaluation.asked_prompt import PUBLISHED, TASK, AskedPrompt, choose_prompt, trained_prompts
from finetune.evaluation.evaluated_model import default_folder, model_fingerprint, style_of
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
from finetune.evaluation.task import Task
from finetune.evaluation.tasks import published_task
from finetune.model.computing import choose_dtype, is_random, own_device
from finetune.recipe.sections import NamedSource, source_names
from finetune.replies.replies import Decoding, generate_replies, plan_replies, stop_ids_of, without_adapter
from finetune.replies.task_replies import Style
from finetune.run.environment import describe_environment
from finetune.terminal import Say, say
from qwenvl import ImageAccess, load_model, load_processor


@dataclass(frozen=True)
class EvaluationSource:
    """A dataset to ask from; see `data.sources.sources.Location`. `format` None is the task's.

    `name` is what its score goes by where there are several; None is the name of its file.
    """

    path: str
    format: str | None = None
    config: str | None = None
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    box_form: str | None = None
    weight: float = 1.0
    limit: int | None = None
    streaming: bool = False
    name: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and how.

    Attributes:
        model: whatever `qwenvl.load_model` takes.
        task: with the most new tokens of a reply.
        sources: what is asked, one after the other; several are scored apart as well.
        compare: a second model, asked the same; None for none.
        images_root, allow_urls: what images may be reached.
        limit: use only the first `limit` questions; None is all.
        sample: number of them to draw by `seed`, in equal shares of all sources; None is all.
        style: None is each model's own.
        prompt: a template, or "published", "trained" or "task", see `asked_prompt`; None is the prompt of training
            where that is known, else the task's. A source's own prompt comes before these two only.
        shots: solved examples before each question, for style base.
        shots_from: where they are drawn from; None is the source of the question.
        dtype, quantization: as `load_model` takes them; "auto" is the device's own.
        batch_tokens: see `replies.Decoding`.
        grounding: read markup in all texts as tokens.
        on_bad_row: what happens to a row that cannot be asked.
        on_bad_image: what happens to an image that is missing or damaged; "wrong" counts its questions as wrong.
        out: where results go; None is `runs/evaluations/MODEL-TASK`, or in a run's own folder.
    """

    model: str
    task: Task
    sources: tuple[EvaluationSource | NamedSource, ...]
    compare: str | None = None
    images_root: str | None = None
    allow_urls: bool = False
    limit: int | None = None
    sample: int | None = None
    seed: int = 0
    style: Style | None = None
    prompt: str | None = None
    shots: int = 0
    shots_from: EvaluationSource | None = None
    dtype: str = "auto"
    quantization: str | None = None
    batch_tokens: int = REPLY_BATCH_TOKENS
    grounding: bool = False
    on_bad_row: Literal["error", "skip"] = "error"
    on_bad_image: Literal["refuse", "wrong"] = "refuse"
    out: Path | None = None


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
    asked = questions[models[0].key]
    folder = evaluation.out or default_folder(evaluation.model, task.name)
    files = [prediction_file(evaluation, folder, model, questions[model.key]) for model in models]

    with hold_folder(folder):
        for file in files:
            file.check()
        earlier = read_results(folder)
        replies = [
            reply_to(evaluation, model, questions[model.key], file, say)
            for model, file in zip(models, files, strict=True)
        ]
        results = describe(evaluation, asked, files[0].identity, models[0].prompt.said, replies, earlier)
        records = [one.records for one in replies]
        if asked.answered:
            scores = [
                score_records(task, questions[model.key], own) for model, own in zip(models, records, strict=True)
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


def with_prompt_given(evaluation: Evaluation) -> Evaluation:
    """The evaluation with what follows from a given prompt: it replaces those of the sources, and with "published" all
    is as in the published scripts.

    Raises:
        UserError: the scripts have no such task, or style chat.
    """
    if evaluation.prompt in (None, TASK):
        return evaluation
    sources = tuple(
        replace(source, prompt=None)
        if isinstance(source, EvaluationSource)
        else source.model_copy(update={"prompt": None})
        for source in evaluation.sources
    )
    if evaluation.prompt != PUBLISHED:
        return replace(evaluation, sources=sources)
    if evaluation.style == "chat":
        raise UserError("--prompt published asks every model in raw text, a chat model too: leave out --style chat")
    return replace(evaluation, task=published_task(evaluation.task), style="base", sources=sources)


Role = Literal["model", "compared"]


@dataclass(frozen=True)
class EvaluatedModel:
    """One of the models: its role, its name as given, and how it is asked."""

    role: Role
    name: str
    style: Style
    prompt: AskedPrompt
    grounding: bool = False

    @property
    def key(self) -> tuple[Style, str | None]:
        """What decides how its questions read; models that have it in common share them."""
        return self.style, self.prompt.text


def find_models(evaluation: Evaluation, say: Say) -> list[EvaluatedModel]:
    """The model, and the one it is compared with.

    Raises:
        InputError: there is no such model, or its style is unknown.
    """
    given: list[tuple[Role, str]] = [("model", evaluation.model)]
    if evaluation.compare:
        given.append(("compared", evaluation.compare))
    models: list[EvaluatedModel] = []
    for role, name in given:
        style = evaluation.style or style_of(name)
        prompt = choose_prompt(
            name,
            evaluation.task,
            style,
            trained_prompts(name, {}),
            given=evaluation.prompt,
            of_sources=[source.prompt for source in evaluation.sources],
            like=models[0].prompt if models else None,
        )
        models.append(EvaluatedModel(role, name, style, prompt))
        say(role, f"{name}, asked as a {style} model {prompt.said}")
    return models


def read_questions(
    evaluation: Evaluation, models: Sequence[EvaluatedModel], say: Say
) -> dict[tuple[Style, str | None], QuestionSample]:
    """The questions as each model is asked, by its `key`; they differ in their prompts alone.

    Raises:
        UserError: rows that cannot be asked, or a source that cannot be read.
    """
    root = evaluation.images_root
    samples: dict[tuple[Style, str | None], QuestionSample] = {}
    for style, prompt in dict.fromkeys(model.key for model in models):
        parts = [
            Questions(
                source,
                evaluation.task,
                prompt=prompt,
                images_root=root,
                access=ImageAccess(root=None if root is None else Path(root), allow_urls=evaluation.allow_urls),
                style=style,
                shots=evaluation.shots,
                shot_source=evaluation.shots_from,
                grounding=evaluation.grounding,
                on_bad_row=evaluation.on_bad_row,
                # With "wrong", a missing image counts as wrong, like a damaged one.
                look_for_images=evaluation.on_bad_image == "refuse",
            )
            for source in evaluation.sources
        ]
        samples[style, prompt] = QuestionSample(
            parts,
            names=source_names(evaluation.sources),
            limit=evaluation.limit,
            sample=evaluation.sample,
            seed=evaluation.seed,
        )
    first = samples[models[0].key]
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
    evaluation: Evaluation, folder: Path, model: EvaluatedModel, questions: QuestionSample
) -> PredictionFile:
    """The file for the replies of a model, with what must be the same for replies to belong together."""
    task = evaluation.task
    identity = {
        "model": model_fingerprint(model.name),
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
            "shots": evaluation.shots,
            "dtype": choose_dtype(evaluation.dtype),
            "quantization": evaluation.quantization,
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
    processor = load_processor(model.name)
    tokenizer = processor.tokenizer
    prompts = QuestionPrompts(questions, numbers, tokenizer, processor.n_queries)
    with ReplyProgress("reading questions", len(numbers)) as progress:
        plan = plan_replies(prompts, progress.reached)
    loaded = load_model(
        model.name,
        dtype=choose_dtype(evaluation.dtype),
        quantization=evaluation.quantization,
        device_map=own_device() if torch.cuda.is_available() else None,
    )
    notes = []
    if is_random(without_adapter(loaded)):
        notes.append(f"{model.name} has random weights: it shows that evaluation works, not that it reads.")
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
    with ReplyProgress(f"{task.name}, {model.name}", len(numbers)) as progress:
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
    if without := evaluation.task.without_right_answer(questions):
        notes.append(
            f"{without:,} questions cannot be answered right: {evaluation.task.metric} compares with answers in lower "
            "case, without articles, and theirs are not; exact_match or anls take them as they are"
        )
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
            "max_new_tokens": evaluation.task.max_new_tokens,
            "shots": evaluation.shots,
            "limit": evaluation.limit,
            "sample": evaluation.sample,
            "seed": evaluation.seed,
            "batch_tokens": evaluation.batch_tokens,
            "dtype": choose_dtype(evaluation.dtype),
            "quantization": evaluation.quantization,
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
        difference = compare_scored(evaluation.task, records[0], ours, others[0])
        found["compared"] = {
            "model": evaluation.compare,
            **others[0].summary(),
            **difference,
            "unread": unread_counts(records[1]),
            "cut": cut_count(records[1]),
        }
    return found
