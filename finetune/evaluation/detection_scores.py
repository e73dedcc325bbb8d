"""What an evaluation of detection says besides its score: precision, recall and F1 of all boxes, and of each name.

The score is the mean of the questions' F1, so that a question counts the same however many boxes it has, and one with
nothing to find counts too: 1 for a reply without a box, 0 for one with boxes. Over all boxes together, such a reply is
false positives or nothing.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.evaluation.question import Question
from finetune.evaluation.task import Task
from finetune.metrics import grounding_accuracy
from finetune.metrics.boxes import IOU_THRESHOLD
from finetune.metrics.detection import Counts, count_by_name
from finetune.quantities import format_loss
from finetune.terminal import terminal_line

_REF = re.compile(r"<ref>(.*?)</ref>", re.DOTALL)
KEPT_NAMES = 1000
"""Names listed in `results.json`, the most frequent ones: referring phrases may all be different."""
BOX_COUNTS = ("precision", "recall", "f1", "found", "extra", "missed")
SHOWN_NAMES = 12
"""Names shown at the end of an evaluation."""


def detection_summary(
    task: Task, questions: Sequence[Question], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The boxes of all replies, as in `results.json`.

    Args:
        task: with metric detection.
        questions, records: all of them, in the same order. A record of an unreadable image has no boxes.

    Returns:
        `iou`, the smallest that counts. `precision`, `recall`, `f1`, and the numbers `found`, `extra` and `missed`,
        of all boxes. `nothing`: the questions with nothing to find, and how many of them were replied to without a
        box. `one_box`: the questions with one gold box, and the published accuracy on them: the reply's first box has
        such an IoU. `names`: each name with the numbers of its boxes, and `more_names`, how many are not listed.
    """
    replies, total = [], Counts()
    nothing, right, one_box, hits = 0, 0, 0, 0.0
    for question, record in zip(questions, records, strict=True):
        readable = "unreadable" not in record
        matched = task.matched(question, record["reply"] if readable else "")
        total += matched.counts
        replies.append((matched, _common_name(question, task.format == "grounding")))
        if not matched.gold:
            nothing += 1
            right += readable and not matched.predicted
        if len(matched.gold) == 1:
            assert question.image_size is not None, "gold boxes come with the size of their image"
            answer = task.extract(record["reply"], question.style) if readable else ""
            one_box += 1
            hits += grounding_accuracy(answer, matched.gold[0].box, question.image_size)
    names = count_by_name(replies)
    listed = dict(list(names.items())[:KEPT_NAMES])
    return {
        "iou": IOU_THRESHOLD,
        **total.summary(),
        "nothing": {"questions": nothing, "right": right},
        "one_box": {"questions": one_box, "accuracy": hits / one_box if one_box else None},
        "names": {name: counts.summary() for name, counts in listed.items()},
        "more_names": len(names) - len(listed),
    }


def detection_lines(detection: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The lines at the end of an evaluation, each a label and its text."""
    lines = [("  all boxes", boxes_text(detection))]
    one, nothing = detection["one_box"], detection["nothing"]
    if one["questions"]:
        said = f"{format_loss(one['accuracy'])} accuracy of the first box, {one['questions']:,} questions"
        lines.append(("  one box", said))
    if nothing["questions"]:
        said = f"{nothing['right']:,} of {nothing['questions']:,} questions with nothing to find have a reply without"
        lines.append(("  no box", said))
    names = detection["names"]
    if len(names) > 1:
        for name, counts in list(names.items())[:SHOWN_NAMES]:
            lines.append((f"  {terminal_line(name)[:40] or '(no name)'}", boxes_text(counts)))
        if left := len(names) - SHOWN_NAMES + detection["more_names"]:
            lines += [("", f"and {left:,} more names")] if left > 0 else []
    return lines


def boxes_text(counts: Mapping[str, Any]) -> str:
    """`precision 0.8000, recall 0.5000, F1 0.6154 (4 found, 1 too many, 4 missed)`"""
    shares = ", ".join(f"{said} {share}" for said, share in zip(SHARES, share_texts(counts), strict=True))
    return f"{shares} ({counts['found']:,} found, {counts['extra']:,} too many, {counts['missed']:,} missed)"


SHARES = ("precision", "recall", "F1")


def share_texts(counts: Mapping[str, Any]) -> list[str]:
    """Precision, recall and F1; a dash where there is no box to take a share of."""
    shares = [counts[key] for key in ("precision", "recall", "f1")]
    return ["-" if share is None else format_loss(share) for share in shares]


def _common_name(question: Question, is_phrase: bool) -> str | None:
    """The name that all boxes of a question have; None where boxes are told apart by names of their own.

    Args:
        is_phrase: the question's text is what is looked for, and no sentence about it.
    """
    assert question.objects is not None, "questions of detection have gold boxes"
    if question.objects.names_count:
        return None
    named = [one.label for one in question.objects.boxes if one.label is not None]
    asked = _REF.findall(question.text)
    if named or asked:
        return (named or asked)[0]
    return question.text if is_phrase else ""
