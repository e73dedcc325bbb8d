"""What an evaluation writes: the replies as they come, the scores at the end; and how one that stopped goes on.

| name | what |
|---|---|
| `evaluation.json` | the identity: model, task, data and settings; another one is never mixed in |
| `predictions.jsonl` | a line for each question, as replies come; at the end in the order of the data, with scores |
| `results.json` | the score with its interval, that of each source and group, counts, settings, versions |
| `submission.json` | in place of a score where the answers are hidden |
| `evaluation.html` | all of it to look at |
| `compared/` | the first two of the model that it is compared with |
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.evaluation.bootstrap import Interval, difference_interval, score_interval
from finetune.evaluation.questions import Question
from finetune.evaluation.tasks import Task
from finetune.files.atomic_writes import make_folder, write_text
from finetune.quantities import format_duration, format_loss
from finetune.replies.replies import Reply
from finetune.run.identity import compare_runs

logger = logging.getLogger(__name__)

IDENTITY = "evaluation.json"
PREDICTIONS = "predictions.jsonl"
RESULTS = "results.json"
SUBMISSION = "submission.json"
COMPARED = "compared"

Record = dict[str, Any]
"""A line of `predictions.jsonl`."""


def record_of(task: Task, number: int, question: Question, reply: Reply) -> Record:
    """The line of one question; `score` comes at the end, as some metrics look at all replies at once."""
    record = {
        "number": number,
        "id": question.id,
        "origin": str(question.origin),
        "question": question.text,
        "answers": list(question.answers),
        "reply": reply.text,
        "prediction": task.extract(reply.text, question.style),
    }
    if question.source is not None:
        record["source"] = question.source
    if question.group is not None:
        record["group"] = question.group
    if question.box is not None:
        record |= {"box": list(question.box), "image_size": list(question.image_size)}
    if reply.unreadable is not None:
        record["unreadable"] = reply.unreadable
    return record


class PredictionFile:
    """`predictions.jsonl` of one model in one folder.

    Args:
        folder: is created by `open`.
        identity: of model, task, data and settings.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self.folder, self.identity = folder, identity
        self.file = folder / PREDICTIONS

    def check(self):
        """Refuse a folder that holds another evaluation. Changes nothing.

        Raises:
            UserError: it does, and in what it differs.
        """
        file = self.folder / IDENTITY
        if not file.is_file():
            if self.file.exists():
                raise UserError(f"{self.file} is there without its {IDENTITY}: give another --out, or remove it")
            return
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is not JSON ({error}): give another --out, or remove the folder") from None
        if differences := compare_runs(stored, dict(self.identity)):
            lines = "\n  ".join(differences)
            raise UserError(
                f"{self.folder} holds another evaluation, which this one would not continue:\n  {lines}\n"
                "Give another --out, or remove that folder"
            )

    def open(self) -> dict[int, Record]:
        """The records that are there already, by the number of their question.

        Raises:
            UserError: the folder holds another evaluation, or a line of the file is damaged.
        """
        self.check()
        make_folder(self.folder)
        if not (self.folder / IDENTITY).is_file():
            write_text(self.folder / IDENTITY, json.dumps(self.identity, indent=2, ensure_ascii=False) + "\n")
        if not self.file.is_file():
            return {}
        # At \n only: strings may hold other line separators.
        *lines, half = self.file.read_bytes().split(b"\n")
        if half:
            logger.warning("%s: removed its half last line (%d bytes)", self.file, len(half))
            with self.file.open("r+b") as file:
                file.truncate(sum(len(line) + 1 for line in lines))
        records = {}
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                records[record["number"]] = record
            except (ValueError, KeyError, TypeError):
                reason = "is damaged; delete the line, and its question is asked again"
                raise UserError(f"{self.file}, line {number}: {reason}") from None
        return records

    def append(self, records: Iterable[Record]):
        """Add lines, in one write: a killed process leaves at most a half last one."""
        with self.file.open("ab", buffering=0) as file:
            file.write("".join(_line(record) for record in records).encode())

    def write(self, records: Sequence[Record]):
        """Replace the file by these records, atomically."""
        write_text(self.file, "".join(_line(record) for record in records))


@dataclass(frozen=True)
class PartScore:
    """The score of the questions of one source, out of several, and its 95% interval."""

    score: float
    interval: Interval
    questions: int

    def summary(self) -> dict[str, Any]:
        """As in `results.json`."""
        return {"score": self.score, "interval": list(self.interval), "questions": self.questions}


@dataclass(frozen=True)
class Scored:
    """What one model's replies are worth.

    Attributes:
        values: (questions,) the score of each; 0 where an image could not be read.
        total: the task's score.
        interval: of the total, 95%.
        groups: name -> score.
        counts: name -> questions.
        sources: name -> the task's score of its questions, in the order of the data; empty where there is one source.
            A metric that looks at all replies at once (cider_d) has looked at those of all sources.
    """

    values: list[float]
    total: float
    interval: Interval
    groups: dict[str, float]
    counts: dict[str, int]
    sources: dict[str, PartScore]

    def summary(self) -> dict[str, Any]:
        """As in `results.json`."""
        groups = {name: {"score": score, "questions": self.counts[name]} for name, score in self.groups.items()}
        sources = {name: part.summary() for name, part in self.sources.items()}
        return {"score": self.total, "interval": list(self.interval), "sources": sources, "groups": groups}


def score_records(task: Task, questions: Sequence[Question], records: Sequence[Record]) -> Scored:
    """Score the replies to all questions, in the same order, and put each question's into its record."""
    scores = task.score_all(questions, [record["reply"] for record in records])
    values = [0.0 if "unreadable" in record else value for record, value in zip(records, scores.values, strict=True)]
    for record, value in zip(records, values, strict=True):
        record["score"] = value
    groups = _groups(records)
    members: dict[str, list[float]] = {}
    for record, value in zip(records, values, strict=True):
        if "group" in record:
            members.setdefault(record["group"], []).append(value)
    return Scored(
        values,
        task.aggregate(np.array(values), groups),
        score_interval(values, groups, task.aggregate),
        {name: sum(members[name]) / len(members[name]) for name in sorted(members)},
        {name: len(members[name]) for name in members},
        _source_scores(task, records),
    )


def _source_scores(task: Task, records: Sequence[Record]) -> dict[str, PartScore]:
    parts: dict[str, list[Record]] = {}
    for record in records:
        if "source" in record:
            parts.setdefault(record["source"], []).append(record)
    scores = {}
    for name, part in parts.items():
        values, groups = [record["score"] for record in part], _groups(part)
        total = task.aggregate(np.array(values), groups)
        scores[name] = PartScore(total, score_interval(values, groups, task.aggregate), len(part))
    return scores


def compare_scored(task: Task, records: Sequence[Record], ours: Scored, theirs: Scored) -> dict[str, Any]:
    """The difference between two models on the same questions, as in `results.json`."""
    pairs = list(zip(ours.values, theirs.values, strict=True))
    return {
        "difference": ours.total - theirs.total,
        "difference_interval": list(difference_interval(ours.values, theirs.values, _groups(records), task.aggregate)),
        "better": sum(mine > other for mine, other in pairs),
        "worse": sum(mine < other for mine, other in pairs),
    }


def submission(task: Task, records: Sequence[Record]) -> list[dict[str, Any]]:
    """What a benchmark's server takes: DocVQA's form for its tasks, else id and answer."""
    if task.name in ("docvqa", "infographicvqa"):
        return [{"questionId": _whole(record["id"]), "answer": record["prediction"]} for record in records]
    return [{"id": record["id"], "answer": record["prediction"]} for record in records]


def _groups(records: Sequence[Record]) -> np.ndarray | None:
    """(questions,) names; None where no question has one."""
    names = [record.get("group") for record in records]
    return None if all(name is None for name in names) else np.array(names, dtype=object)


def _whole(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def summary(results: Mapping[str, Any]) -> list[str]:
    """The lines at the end: a label in 11 columns, a space, what it says."""
    lines = []

    def line(label: str, text: str):
        lines.append(f"{label:<11} {text}")

    if "score" in results:
        line(results["metric"], f"{score_text(results)}, {results['questions']:,} questions")
        compared = results.get("compared")
        for name, source in results["sources"].items():
            other = f"; compared: {format_loss(compared['sources'][name]['score'])}" if compared else ""
            line(f"  {name}", f"{score_text(source)}, {source['questions']:,} questions{other}")
        for name, group in results["groups"].items():
            line(f"  {name}", f"{format_loss(group['score'])}, {group['questions']:,} questions")
        if compared:
            low, high = compared["difference_interval"]
            line("compared", f"{score_text(compared)}, {compared['model']}")
            line(
                "difference",
                f"{compared['difference']:+.4f} (95% {low:+.4f} to {high:+.4f}); "
                f"{compared['better']:,} questions better, {compared['worse']:,} worse",
            )
    else:
        line("submission", f"the answers are hidden: {results['submission']} is written in place of a score")
    if results["unreadable"]:
        line("unreadable", f"{len(results['unreadable']):,} questions on images that cannot be read: counted as wrong")
    for note in results["notes"]:
        line("note", note)
    if speed := results["speed"]:
        rate = f"{speed['examples_per_second']:.2f} examples/s"
        line("speed", f"{rate}, {speed['replies']:,} replies in {format_duration(speed['seconds'])}")
    return lines


def score_text(scores: Mapping[str, Any]) -> str:
    low, high = scores["interval"]
    return f"{format_loss(scores['score'])} (95% {format_loss(low)} to {format_loss(high)})"
