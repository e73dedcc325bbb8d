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
from finetune.evaluation.evaluated_model import default_folder, model_fingerprint
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
    hold_folder,
    read_results,
    record_of,
    score_records,
    submission,
    summary,
    with_scores,
    write_json,
)
from finetune.evaluation.tasks import Task
from finetune.model.computing import choose_dtype, is_random, own_device
from finetune.recipe.sections import NamedSource, source_names
from finetune.replies.model_style import ModelUse, find_use
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
        base: of an adapter, where it is not where the adapter says; None for where it says.
        images_root, allow_urls: what images may be reached.
        limit: use only the first `limit` questions; None is all.
        sample: number of them to draw by `seed`, in equal shares of all sources; None is all.
        style: None is each model's own.
        shots: solved examples before each question, for style base.
        dtype: as `load_model` takes it; "auto" is the device's own.
        quantization: "nf4" or "none" for both models; None is each model's own, as it was trained.
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
    base: str | None = None
    images_root: str | None = None
    allow_urls: bool = False
    limit: int | None = None
    sample: int | None = None
    seed: int = 0
    style: Style | None = None
    shots: int = 0
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
    task = evaluation.task

    models = find_models(evaluation, say)
    questions = read_questions(evaluation, models, say)
    asked = questions[models[0].style]
    folder = evaluation.out or default_folder(evaluation.model, task.name)
    files = [prediction_file(evaluation, folder, model, questions[model.style]) for model in models]

    with hold_folder(folder):
        for file in files:
            file.check()
        earlier = read_results(folder)
        replies = [
            reply_to(evaluation, model, questions[model.style], file, say)
            for model, file in zip(models, files, strict=True)
        ]
        results = describe(evaluation, asked, files[0].identity, replies, earlier)
        records = [one.records for one in replies]
        if asked.answered:
            scores = [
                score_records(task, questions[model.style], own) for model, own in zip(models, records, strict=True)
            ]
            results |= score_summary(evaluation, records[0], scores)
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


Role = Literal["model", "compared"]


@dataclass(frozen=True)
class EvaluatedModel:
    """One of the models: its role, and how it is asked and loaded."""

    role: Role
    use: ModelUse

    @property
    def name(self) -> str:
        return self.use.name

    @property
    def style(self) -> Style:
        return self.use.style


def find_models(evaluation: Evaluation, say: Say) -> list[EvaluatedModel]:
    """The model, and the one it is compared with.

    Raises:
        InputError: there is no such model, or its style is unknown.
    """
    given: list[tuple[Role, str, str | None]] = [("model", evaluation.model, evaluation.base)]
    if evaluation.compare:
        given.append(("compared", evaluation.compare, None))
    models = []
    for role, name, base in given:
        use = find_use(name, base=base, style=evaluation.style, quantization=evaluation.quantization)
        say(role, f"{name}, {use}")
        models.append(EvaluatedModel(role, use))
    return models


def read_questions(evaluation: Evaluation, models: Sequence[EvaluatedModel], say: Say) -> dict[Style, QuestionSample]:
    """The questions in the style of each model; they differ in their prompts alone.

    Raises:
        UserError: rows that cannot be asked, or a source that cannot be read.
    """
    root = evaluation.images_root
    samples: dict[Style, QuestionSample] = {}
    for style in dict.fromkeys(model.style for model in models):
        parts = [
            Questions(
                source,
                evaluation.task,
                images_root=root,
                access=ImageAccess(root=None if root is None else Path(root), allow_urls=evaluation.allow_urls),
                style=style,
                shots=evaluation.shots,
                grounding=evaluation.grounding,
                on_bad_row=evaluation.on_bad_row,
                # With "wrong", a missing image counts as wrong, like a damaged one.
                look_for_images=evaluation.on_bad_image == "refuse",
            )
            for source in evaluation.sources
        ]
        samples[style] = QuestionSample(
            parts,
            names=source_names(evaluation.sources),
            limit=evaluation.limit,
            sample=evaluation.sample,
            seed=evaluation.seed,
        )
    first = samples[models[0].style]
    say("task", f"{evaluation.task.name}: {evaluation.task.metric} on {first}")
    if first.problems:
        say("left out", f"{len(first.problems):,} rows that cannot be asked; {RESULTS} lists them")
    return samples


def prediction_file(
    evaluation: Evaluation, folder: Path, model: EvaluatedModel, questions: QuestionSample
) -> PredictionFile:
    """The file for the replies of a model, with what must be the same for replies to belong together."""
    task = evaluation.task
    identity = {
        "model": model_fingerprint(model.use.source),
        "task": {
            "name": task.name,
            "metric": task.metric,
            "max_new_tokens": task.max_new_tokens,
            "stop": task.stop,
        },
        "data": {"questions": len(questions), "fingerprint": questions.fingerprint()},
        "settings": {
            "style": model.style,
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
    stop_texts = task.stop if model.style == "base" else ()
    decoding = Decoding(
        task.max_new_tokens,
        stop_ids_of(loaded, tokenizer, model.style),
        tuple(text for text in stop_texts if text not in tokenizer.control_tokens),
        batch_tokens=evaluation.batch_tokens,
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
    replies: Sequence[Replies],
    earlier: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All of `results.json` but the scores.

    Args:
        evaluation: what was asked.
        questions, identity: of the model.
        replies: of the model and of the one it is compared with.
        earlier: `results.json` of the same evaluation, finished before: the speed of replies that were there already,
            and its notes. None where there is none.
    """
    notes = [note for one in replies for note in one.notes]
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
        "left_out": [str(problem) for problem in questions.problems],
        "notes": notes if earlier is None else list(dict.fromkeys([*earlier["notes"], *notes])),
        "settings": {
            "style": identity["settings"]["style"],
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


def score_summary(evaluation: Evaluation, records: Sequence[Record], scores: Sequence[Scored]) -> dict[str, Any]:
    """The scores in `results.json`, of the model and of the one it is compared with."""
    ours, *others = scores
    found = ours.summary()
    if others:
        difference = compare_scored(evaluation.task, records, ours, others[0])
        found["compared"] = {"model": evaluation.compare, **others[0].summary(), **difference}
    return found
