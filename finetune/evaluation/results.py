"""The files of an evaluation: replies as they come, scores at the end; and how an interrupted one continues.

| name | what |
|---|---|
| `evaluation.json` | the identity: model, task, data and settings; replies of another one are never mixed in |
| `predictions.jsonl` | a line for each question, as replies come; at the end in the order of the data, with scores |
| `results.json` | the score with its interval, that of each source and group, counts, settings, versions |
| `submission.json` | in place of a score where the answers are hidden |
| `evaluation.html` | a page with all of it |
| `compared/` | the first two files, of the model that it is compared with |
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.evaluation.bootstrap import Interval, difference_interval, score_interval
from finetune.evaluation.detection_scores import detection_lines, detection_summary
from finetune.evaluation.field_scores import KEY as FIELDS_FOUND
from finetune.evaluation.field_scores import f1_difference, field_lines, fields_record, fields_summary, micro_f1
from finetune.evaluation.questions import Question
from finetune.evaluation.task import Task
from finetune.files.atomic_writes import make_folder, write_text
from finetune.files.path_errors import path_errors
from finetune.quantities import format_duration, format_loss
from finetune.replies.replies import Reply
from finetune.run.identity import compare_runs
from finetune.run.lock import lock_folder
from finetune.terminal import terminal_line
from qwenvl.checkpoint.identity import differences, identity_from_json

logger = logging.getLogger(__name__)

IDENTITY = "evaluation.json"
PREDICTIONS = "predictions.jsonl"
RESULTS = "results.json"
SUBMISSION = "submission.json"
COMPARED = "compared"

Record = dict[str, Any]
"""A line of `predictions.jsonl`."""


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Create the evaluation's folder and keep other processes out of it.

    Raises:
        PathError: the folder cannot be written.
        RunLocked: another process holds it.
    """
    with ExitStack() as stack:
        with writing(folder):
            stack.enter_context(lock_folder(folder))
        yield


def writing(path: Path) -> AbstractContextManager[None]:
    """Turns an OSError about a path of the evaluation into a sentence."""
    return path_errors(path, "write", "Give another folder with --out")


def write_json(path: Path, value: Any, indent: int = 2) -> None:
    """Write a JSON file, atomically."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def read_results(folder: Path) -> dict[str, Any] | None:
    """What `results.json` says; None where the evaluation has not finished before.

    Raises:
        UserError: it is damaged.
    """
    file = folder / RESULTS
    remedy = "remove it, and the same command writes it again"
    results = _read_object(file, remedy)
    if results is not None and not {"speed", "notes"} <= results.keys():
        raise UserError(f"{file} lacks its speed or notes: {remedy}")
    return results


def _read_object(file: Path, remedy: str) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file."""
    if not file.is_file():
        return None
    with path_errors(file, "read", "Give another folder with --out"):
        data = file.read_bytes()
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object: {remedy}")
    return value


def record_of(task: Task, number: int, question: Question, reply: Reply) -> Record:
    """The line of one question, without its score: some metrics look at all replies at once."""
    record: Record = {
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
    if question.fields is not None:
        record[FIELDS_FOUND] = fields_record(record["prediction"], question.fields)
    if question.box is not None:
        assert question.image_size is not None, "a box comes with the size of its image"
        record |= {"box": list(question.box), "image_size": list(question.image_size)}
    if question.objects is not None:
        assert question.image_size is not None, "boxes come with the size of their image"
        record |= {
            "objects": [{"label": one.label, "box": list(one.box)} for one in question.objects.boxes],
            "image_size": list(question.image_size),
        }
    if reply.unreadable is not None:
        record["unreadable"] = reply.unreadable
        return record
    if (why := task.unread(question, reply.text)) is not None:
        record["unread"] = why
    if reply.cut and not task.by_likelihood:
        record["cut"] = True
    return record


def unread_counts(records: Sequence[Record]) -> dict[str, int]:
    """Why replies could not be read as answers -> how many of them, the most frequent first."""
    return dict(Counter(record["unread"] for record in records if "unread" in record).most_common())


def cut_count(records: Sequence[Record]) -> int:
    """How many replies ended because they had the most new tokens."""
    return sum("cut" in record for record in records)


class PredictionFile:
    """`predictions.jsonl` of one model in one folder.

    Args:
        folder: is created by `open`.
        identity: of model, task, data and settings.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self.folder, self.identity = folder, identity
        self.file = folder / PREDICTIONS

    def check(self) -> None:
        """Refuse a folder that holds another evaluation. Changes nothing.

        Raises:
            UserError: it does, with the differences; or the path is not a folder, or damaged.
        """
        for path, is_right, kind in (
            (self.folder, self.folder.is_dir(), "folder"),
            (self.file, self.file.is_file(), "file"),
        ):
            if os.path.lexists(path) and not is_right:
                raise UserError(f"{path} is not a {kind}: give another --out, or remove it")
        stored = _read_object(self.folder / IDENTITY, "give another --out, or remove the folder")
        if stored is None:
            if self.file.exists():
                raise UserError(f"{self.file} is there without its {IDENTITY}: give another --out, or remove it")
            return
        if changes := self._changes(stored):
            lines = "\n  ".join(changes)
            raise UserError(
                f"{self.folder} holds another evaluation, which this one would not continue:\n  {lines}\n"
                "Give another --out, or remove that folder"
            )

    def _changes(self, stored: dict[str, Any]) -> list[str]:
        """In what this evaluation differs from that of the replies that are there."""
        match stored, self.identity:
            case {"model": {"base": was}}, {"model": {"base": now}}:
                file = self.folder / IDENTITY
                bases = differences(identity_from_json(was, file), identity_from_json(now, file))
                changes = [f"model.base: {change}" for change in bases]
                return changes + compare_runs(stored, dict(self.identity), ignore=("model.base",))
        return compare_runs(stored, dict(self.identity))

    def open(self) -> dict[int, Record]:
        """The records that are there already, by the number of their question.

        Raises:
            UserError: the folder holds another evaluation or cannot be written, or a line of the file is damaged.
        """
        self.check()
        make_folder(self.folder)
        if not (self.folder / IDENTITY).is_file():
            write_json(self.folder / IDENTITY, self.identity)
        with writing(self.file), self.file.open("a+b") as file:
            file.seek(0)
            # At \n only: strings may hold other line separators.
            *lines, half = file.read().split(b"\n")
            if half:
                logger.warning("%s: removed its half last line (%d bytes)", self.file, len(half))
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

    def append(self, records: Iterable[Record]) -> None:
        """Add lines, in one write: a killed process leaves at most a half last one."""
        with writing(self.file), self.file.open("ab", buffering=0) as file:
            file.write("".join(_line(record) for record in records).encode())

    def write(self, records: Sequence[Record]) -> None:
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
        fields: of a task of fields, see `fields_summary`.
        sources: name -> the task's score of its questions, in the order of the data; empty where there is one source.
            A metric that looks at all replies at once (cider_d) has looked at those of all sources.
        detection: the boxes of all replies together, see `detection.detection_summary`; None for other metrics.
    """

    values: list[float]
    total: float
    interval: Interval
    groups: dict[str, float]
    counts: dict[str, int]
    sources: dict[str, PartScore]
    detection: dict[str, Any] | None = None
    fields: dict[str, Any] | None = None

    def summary(self) -> dict[str, Any]:
        """As in `results.json`."""
        groups = {name: {"score": score, "questions": self.counts[name]} for name, score in self.groups.items()}
        sources = {name: part.summary() for name, part in self.sources.items()}
        found: dict[str, Any] = {
            "score": self.total,
            "interval": list(self.interval),
            "sources": sources,
            "groups": groups,
        }
        if self.detection is not None:
            found["detection"] = self.detection
        if self.fields is not None:
            found["fields"] = self.fields
        return found


def score_records(task: Task, questions: Sequence[Question], records: Sequence[Record]) -> Scored:
    """Score the replies to all questions; `records` are in the order of `questions`."""
    scores = task.score_all(questions, [record["reply"] for record in records])
    values = [0.0 if "unreadable" in record else value for record, value in zip(records, scores.values, strict=True)]
    members = _by_key(records, values, "group")
    return Scored(
        values,
        *_total(task, records, values),
        {name: sum(members[name]) / len(members[name]) for name in sorted(members)},
        {name: len(members[name]) for name in members},
        _source_scores(task, records, values),
        detection_summary(task, questions, records) if task.is_detection else None,
        fields_summary(records) if task.reads_fields else None,
    )


def _total(task: Task, records: Sequence[Record], values: Sequence[float]) -> tuple[float, Interval]:
    """The task's score of these records, and its interval."""
    if task.reads_fields:
        return micro_f1(records)
    groups = _groups(records)
    return task.aggregate(np.array(values), groups), score_interval(values, groups, task.aggregate)


def with_scores(records: Sequence[Record], scored: Scored) -> list[Record]:
    """The records, each with its score."""
    return [{**record, "score": value} for record, value in zip(records, scored.values, strict=True)]


def _by_key(records: Sequence[Record], values: Sequence[float], key: str) -> dict[str, list[float]]:
    """Scores by what the records have under `key`; records without it are left out."""
    members: dict[str, list[float]] = {}
    for record, value in zip(records, values, strict=True):
        if key in record:
            members.setdefault(record[key], []).append(value)
    return members


def _source_scores(task: Task, records: Sequence[Record], values: Sequence[float]) -> dict[str, PartScore]:
    scores = {}
    for name, part in _by_key(records, values, "source").items():
        own = [record for record in records if record.get("source") == name]
        scores[name] = PartScore(*_total(task, own, part), len(part))
    return scores


def compare_scored(
    task: Task, records: Sequence[Record], ours: Scored, theirs: Scored, compared: Sequence[Record] = ()
) -> dict[str, Any]:
    """The difference between two models on the same questions, as in `results.json`.

    Args:
        records, compared: of the two models; those of the second are needed for fields only.
    """
    if task.reads_fields:
        interval = f1_difference(records, compared)
    else:
        interval = difference_interval(ours.values, theirs.values, _groups(records), task.aggregate)
    pairs = list(zip(ours.values, theirs.values, strict=True))
    return {
        "difference": ours.total - theirs.total,
        "difference_interval": list(interval),
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


def summary(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The lines at the end, each a label and its text."""
    lines = []
    compared = results.get("compared")
    if "score" in results:
        lines.append((results["metric"], f"{score_text(results)}, {results['questions']:,} questions"))
        for name, source in results["sources"].items():
            other = f"; compared: {format_loss(compared['sources'][name]['score'])}" if compared else ""
            lines.append((f"  {name}", f"{score_text(source)}, {source['questions']:,} questions{other}"))
        lines += field_lines(results, compared)
        for name, group in results["groups"].items():
            score = format_loss(group["score"])
            lines.append((f"  {terminal_line(name)}", f"{score}, {group['questions']:,} questions"))
        if compared:
            low, high = compared["difference_interval"]
            lines.append(("compared", f"{score_text(compared)}, {compared['model']}"))
            lines.append(
                (
                    "difference",
                    f"{compared['difference']:+.4f} (95% {low:+.4f} to {high:+.4f}); "
                    f"{compared['better']:,} questions better, {compared['worse']:,} worse",
                )
            )
        if "detection" in results:
            lines += detection_lines(results["detection"])
    else:
        lines.append(("submission", f"the answers are hidden: {results['submission']} is written in place of a score"))
    if results["unreadable"]:
        count = len(results["unreadable"])
        lines.append(("unreadable", f"{count:,} questions on images that cannot be read: counted as wrong"))
    wrong = "counted as wrong" if "score" in results else "written as they are"
    lines += [("unread", f"{said}: {wrong}") for said in unread_lines(results["unread"], compared)]
    if cut := results["cut"]:
        limit = results["settings"]["max_new_tokens"]
        lines.append(("cut", f"{cut:,} replies end at the limit of {limit} new tokens; --max-new-tokens raises it"))
    lines += [("note", note) for note in results["notes"]]
    if speed := results["speed"]:
        rate = f"{speed['examples_per_second']:.2f} examples/s"
        lines.append(("speed", f"{rate}, {speed['replies']:,} replies in {format_duration(speed['seconds'])}"))
    return lines


def unread_lines(unread: Mapping[str, int], compared: Mapping[str, Any] | None) -> list[str]:
    """`12 replies hold no box (compared: 3)`, for each reason why replies could not be read."""
    theirs = {} if compared is None else compared["unread"]
    return [
        f"{unread.get(why, 0):,} replies {why}" + (f" (compared: {theirs.get(why, 0):,})" if compared else "")
        for why in dict.fromkeys([*unread, *theirs])
    ]


def score_text(scores: Mapping[str, Any]) -> str:
    low, high = scores["interval"]
    return f"{format_loss(scores['score'])} (95% {format_loss(low)} to {format_loss(high)})"
