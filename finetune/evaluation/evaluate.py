"""The road of `finetune evaluate`: a model, a task, its data -> replies, a score with its interval, a page to look at.

    evaluate(Evaluation("runs/docvqa", find_task("docvqa"), (EvaluationSource("validation.parquet"),)))

What is wrong with data, folder or settings is told before weights are loaded. Replies are written as they come; the
same call after an interruption asks what is left.
"""

import gc
import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import logging as transformers_logging

from finetune.batches.budget import REPLY_BATCH_TOKENS
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
    record_of,
    score_records,
    submission,
    summary,
)
from finetune.evaluation.tasks import Task
from finetune.files.atomic_writes import write_text
from finetune.model.computing import choose_dtype, is_random, own_device
from finetune.recipe.sections import NamedSource, source_names
from finetune.replies.replies import Decoding, generate_replies, plan_replies, stop_ids_of
from finetune.replies.task_replies import Style
from finetune.run.environment import describe_environment
from finetune.run.folder import RunFolder
from qwenvl import ImageAccess, load_model, load_processor


@dataclass(frozen=True)
class EvaluationSource:
    """A dataset to ask from; see `data.sources.sources.Source`. `format` None is the task's.

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
        limit: only the first so many questions; None is all.
        sample: so many of them, drawn by `seed`, equal shares of all sources; None is all.
        style: None is each model's own.
        shots: solved examples before each question, for style base.
        dtype, quantization: as `load_model` takes them; "auto" is the device's own.
        batch_tokens: see `replies.Decoding`.
        grounding: read markup in all texts as tokens.
        on_bad_row: what becomes of a row that cannot be asked.
        on_bad_image: what becomes of an image that is missing or damaged; "wrong" counts its questions as wrong.
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
    shots: int = 0
    dtype: str = "auto"
    quantization: str | None = None
    batch_tokens: int = REPLY_BATCH_TOKENS
    grounding: bool = False
    on_bad_row: Literal["error", "skip"] = "error"
    on_bad_image: Literal["refuse", "wrong"] = "refuse"
    out: Path | None = None


def evaluate(evaluation: Evaluation, say: Callable[[str], None] = print) -> Path:
    """Ask, score and report, or go on with an evaluation that was interrupted.

    Returns:
        The folder with the results; `results` says what is in it.

    Raises:
        UserError, ValueError, FileNotFoundError: the input is wrong (see the message).
        RunLocked: another process holds the folder.
        Failed: the device's memory does not hold a single prompt.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    return _Road(evaluation, say).walk()


class _Road:
    """The steps of one evaluation."""

    def __init__(self, evaluation: Evaluation, say: Callable[[str], None]):
        self.evaluation, self.say = evaluation, say
        self.task = evaluation.task
        self.asked: dict[Style, QuestionSample] = {}
        self.notes: list[str] = []
        self.speed: dict[str, float] | None = None

    def walk(self) -> Path:
        evaluation = self.evaluation
        names = {"model": evaluation.model} | ({"compared": evaluation.compare} if evaluation.compare else {})
        styles = {}
        for label, name in names.items():
            styles[label] = evaluation.style or style_of(name)
            self.say(f"{label:<11} {name}, asked as a {styles[label]} model")
        for style in styles.values():
            self.read_questions(style)
        out = evaluation.out or default_folder(evaluation.model, self.task.name)
        files = {
            label: PredictionFile(
                out / COMPARED if label == "compared" else out, self.identity(name, self.asked[styles[label]])
            )
            for label, name in names.items()
        }
        with ExitStack() as stack:
            stack.enter_context(RunFolder(out).lock())
            for file in files.values():
                file.check()
            records = {
                label: self.answer(name, self.asked[styles[label]], files[label]) for label, name in names.items()
            }
            questions = {label: self.asked[styles[label]] for label in names}
            self.finish(out, questions, files, records)
        return out

    # Before anything heavy is loaded

    def read_questions(self, style: Style):
        if style in self.asked:
            return
        evaluation = self.evaluation
        parts = [
            Questions(
                source,
                self.task,
                images_root=evaluation.images_root,
                access=ImageAccess(root=evaluation.images_root, allow_urls=evaluation.allow_urls),
                style=style,
                shots=evaluation.shots,
                grounding=evaluation.grounding,
                on_bad_row=evaluation.on_bad_row,
                # One that is missing then counts as wrong, like one that is damaged.
                look_for_images=evaluation.on_bad_image == "refuse",
            )
            for source in evaluation.sources
        ]
        asked = QuestionSample(
            parts,
            names=source_names(evaluation.sources),
            limit=evaluation.limit,
            sample=evaluation.sample,
            seed=evaluation.seed,
        )
        if not self.asked:
            self.say(f"{'task':<11} {self.task.name}: {self.task.metric} on {asked}")
            if asked.problems:
                self.say(f"{'left out':<11} {len(asked.problems):,} rows that cannot be asked; {RESULTS} lists them")
        self.asked[style] = asked

    def identity(self, model: str, asked: QuestionSample) -> dict[str, Any]:
        """What must be the same for replies to belong together."""
        evaluation, task = self.evaluation, asdict(self.task)
        return {
            "model": model_fingerprint(model),
            "task": {key: task[key] for key in ("name", "metric", "max_new_tokens", "stop")},
            "data": {
                "questions": len(asked),
                "fingerprint": asked.fingerprint(),
            },
            "settings": {
                "style": asked[0].style,
                "shots": evaluation.shots,
                "dtype": choose_dtype(evaluation.dtype),
                "quantization": evaluation.quantization,
            },
        }

    # Replies

    def answer(self, model_name: str, asked: QuestionSample, file: PredictionFile) -> list[Record]:
        """The records of all questions in their order: those that are there, and those of new replies."""
        records = file.open()
        left = [number for number in range(len(asked)) if number not in records]
        if records:
            self.say(f"{'resume':<11} {len(records):,} of {len(asked):,} replies of {model_name} are there")
        if left:
            self.generate(model_name, asked, left, file, records)
        return [records[number] for number in range(len(asked))]

    def generate(self, model_name: str, asked: QuestionSample, left: list[int], file: PredictionFile, records: dict):
        evaluation, processor = self.evaluation, load_processor(model_name)
        prompts = QuestionPrompts(asked, left, processor.tokenizer, processor.n_queries)
        with ReplyProgress("reading questions", len(left)) as progress:
            plan = plan_replies(prompts, progress.reached)
        model = load_model(
            model_name,
            dtype=choose_dtype(evaluation.dtype),
            quantization=evaluation.quantization,
            device_map=own_device() if torch.cuda.is_available() else None,
        )
        if is_random(model):
            self.notes.append(f"{model_name} has random weights: it shows that evaluation works, not that it reads.")
        stops = self.task.stop if asked[0].style == "base" else ()
        decoding = Decoding(
            self.task.max_new_tokens,
            stop_ids_of(model, processor.tokenizer, asked[0].style),
            tuple(stop for stop in stops if stop not in processor.tokenizer.control_tokens),
            batch_tokens=evaluation.batch_tokens,
        )
        started = time.monotonic()
        with ReplyProgress(f"{self.task.name}, {model_name}", len(left)) as progress:
            replies = generate_replies(
                model,
                prompts,
                plan,
                processor.tokenizer,
                processor.image_processor,
                decoding,
                on_bad_image=evaluation.on_bad_image,
            )
            for done, reply in enumerate(replies, start=1):
                number = left[reply.index]
                records[number] = record_of(self.task, number, asked[number], reply)
                file.append([records[number]])
                progress.reached(done)
        seconds = time.monotonic() - started
        if model_name == evaluation.model:
            self.speed = {
                "replies": len(left),
                "seconds": round(seconds, 2),
                "examples_per_second": round(len(left) / max(seconds, 1e-9), 3),
            }
        # One model at a time: the next one may need the room.
        del model, replies
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # Scores

    def finish(self, out: Path, questions: dict, files: dict[str, PredictionFile], records: dict[str, list[Record]]):
        asked = questions["model"]
        results = self.describe(out, asked, records)
        scored: dict[str, Scored] = {}
        if asked.answered:
            for label, own in records.items():
                scored[label] = score_records(self.task, questions[label], own)
            results |= scored["model"].summary()
            if "compared" in scored:
                theirs = scored["compared"]
                difference = compare_scored(self.task, records["model"], scored["model"], theirs)
                results["compared"] = {"model": self.evaluation.compare, **theirs.summary(), **difference}
        else:
            text = json.dumps(submission(self.task, records["model"]), indent=1, ensure_ascii=False)
            write_text(out / SUBMISSION, text + "\n")
            results["submission"] = SUBMISSION
        for label, own in records.items():
            files[label].write(own)
        write_text(out / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        page = write_evaluation_page(out, results, asked, records["model"], records.get("compared"))
        for line in summary(results):
            self.say(line)
        self.say(f"{'replies':<11} {out / PREDICTIONS}")
        self.say(f"{'results':<11} {out / RESULTS}")
        self.say(f"{'page':<11} {page}")

    def describe(self, out: Path, asked: QuestionSample, records: dict[str, list[Record]]) -> dict[str, Any]:
        """All of `results.json` but the scores."""
        speed, notes = self.speed, self.notes
        if (out / RESULTS).is_file():  # of this same evaluation: what replies that were there took, and what was noted
            before = json.loads((out / RESULTS).read_text(encoding="utf-8"))
            speed, notes = speed or before["speed"], list(dict.fromkeys([*before["notes"], *notes]))
        evaluation = self.evaluation
        return {
            "model": evaluation.model,
            "task": self.task.name,
            "metric": self.task.metric,
            "data": [source.path for source in evaluation.sources],
            "questions": len(asked),
            "of": asked.total,
            "unreadable": [
                {key: record[key] for key in ("id", "origin", "unreadable")}
                for record in records["model"]
                if "unreadable" in record
            ],
            "left_out": [str(problem) for problem in asked.problems],
            "notes": notes,
            "settings": {
                "style": asked[0].style,
                "max_new_tokens": self.task.max_new_tokens,
                **{key: getattr(evaluation, key) for key in ("shots", "limit", "sample", "seed", "batch_tokens")},
                "dtype": choose_dtype(evaluation.dtype),
                "quantization": evaluation.quantization,
            },
            "speed": speed,
            "identity": self.identity(evaluation.model, asked),
            "environment": describe_environment(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"),
        }
