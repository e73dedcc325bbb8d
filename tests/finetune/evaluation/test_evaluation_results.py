"""The files of an evaluation, and what is computed for them."""

import json
from dataclasses import dataclass

import pytest

from finetune.errors import UserError
from finetune.evaluation.results import (
    PredictionFile,
    compare_scored,
    score_records,
    submission,
    summary,
    with_scores,
)
from finetune.evaluation.tasks import custom_task, find_task
from finetune.terminal import labelled

IDENTITY = {"model": {"base": "abc", "adapter": None}, "settings": {"style": "chat", "shots": 0}}


@dataclass
class Asked:
    """What a metric asks of a question."""

    answers: tuple[str, ...]
    id: str = "1"
    style: str = "chat"
    group: str | None = None


def records(*replies: str, **more) -> list[dict]:
    return [{"number": number, "reply": reply, **more} for number, reply in enumerate(replies)]


def test_lines_are_kept_and_a_half_one_is_dropped(tmp_path):
    file = PredictionFile(tmp_path / "out", IDENTITY)
    assert file.open() == {}
    file.append(records("a\u2028b", "c"))  # a line separator that splitlines would cut at
    with file.file.open("ab") as opened:
        opened.write(b'{"number": 2, "reply": "\xe6')  # torn within a character
    found = PredictionFile(tmp_path / "out", IDENTITY).open()
    assert [found[number]["reply"] for number in (0, 1)] == ["a\u2028b", "c"] and len(found) == 2
    file.append([{"number": 2, "reply": "d"}])
    assert len(file.open()) == 3


def test_another_identity_is_refused_with_the_difference(tmp_path):
    PredictionFile(tmp_path, IDENTITY).open()
    other = {**IDENTITY, "settings": {"style": "base", "shots": 0}}
    with pytest.raises(UserError, match=r'settings\.style: "chat" -> "base"'):
        PredictionFile(tmp_path, other).check()
    PredictionFile(tmp_path, json.loads(json.dumps(IDENTITY))).check()


def test_replies_of_nobody_knows_what_are_refused(tmp_path):
    (tmp_path / "predictions.jsonl").write_text('{"number": 0}\n')
    with pytest.raises(UserError, match=r"without its evaluation\.json"):
        PredictionFile(tmp_path, IDENTITY).open()


def test_an_image_that_was_not_seen_is_wrong_whatever_is_right():
    task = custom_task("exact_match")
    asked = [Asked(("a",)), Asked(("b",)), Asked(("c",))]
    own = records("a", "b", "x")
    own[1]["unreadable"] = "page.png: it is damaged"
    scored = score_records(task, asked, own)
    assert scored.values == [1.0, 0.0, 0.0] and scored.total == pytest.approx(1 / 3)
    assert [record["score"] for record in with_scores(own, scored)] == scored.values
    assert not any("score" in record for record in own)
    assert scored.interval.low == 0.0 and scored.interval.high == 1.0


def test_groups_are_counted_and_averaged():
    task = find_task("chartqa")
    own = records("1", "x", "3", "x")
    for record, group in zip(own, ("human", "human", "human", "augmented"), strict=True):
        record["group"] = group
    asked = [Asked((answer,), group=record["group"]) for answer, record in zip("1234", own, strict=True)]
    scored = score_records(task, asked, own)
    assert scored.groups == {"augmented": 0.0, "human": pytest.approx(2 / 3)}
    assert scored.counts == {"augmented": 1, "human": 3} and scored.total == pytest.approx(1 / 3)
    assert scored.summary()["groups"]["human"] == {"score": pytest.approx(2 / 3), "questions": 3}


def test_a_comparison_counts_both_ways():
    task, asked = custom_task("exact_match"), [Asked(("a",))] * 4
    ours, theirs = records("a", "a", "b", "a"), records("b", "a", "a", "b")
    scores = score_records(task, asked, ours), score_records(task, asked, theirs)
    compared = compare_scored(task, ours, *scores)
    assert compared["difference"] == pytest.approx(0.25) and (compared["better"], compared["worse"]) == (2, 1)
    low, high = compared["difference_interval"]
    assert -1 <= low < 0.25 < high <= 1


def test_submissions():
    own = [{"id": "17", "prediction": "12.50"}, {"id": "row 2", "prediction": ""}]
    assert submission(find_task("docvqa"), own) == [
        {"questionId": 17, "answer": "12.50"},
        {"questionId": "row 2", "answer": ""},
    ]
    assert submission(find_task("textvqa"), own)[0] == {"id": "17", "answer": "12.50"}


def test_the_lines_at_the_end():
    results = {
        "metric": "anls",
        "score": 0.5,
        "interval": [0.4, 0.6],
        "questions": 1200,
        "sources": {},
        "groups": {"form": {"score": 0.25, "questions": 200}},
        "unreadable": [{}],
        "unread": {"hold no box": 12},
        "cut": 30,
        "settings": {"max_new_tokens": 28},
        "notes": [],
        "speed": {"replies": 1200, "seconds": 75.0, "examples_per_second": 16.0},
        "compared": {
            "model": "base",
            "score": 0.25,
            "interval": [0.2, 0.3],
            "sources": {},
            "difference": 0.25,
            "difference_interval": [0.2, 0.3],
            "better": 400,
            "worse": 100,
            "unread": {"hold no box": 3, "are empty": 1},
        },
    }
    assert [labelled(*line) for line in summary(results)] == [
        "anls        0.5000 (95% 0.4000 to 0.6000), 1,200 questions",
        "  form      0.2500, 200 questions",
        "compared    0.2500 (95% 0.2000 to 0.3000), base",
        "difference  +0.2500 (95% +0.2000 to +0.3000); 400 questions better, 100 worse",
        "unreadable  1 questions on images that cannot be read: counted as wrong",
        "unread      12 replies hold no box (compared: 3): counted as wrong",
        "unread      0 replies are empty (compared: 1): counted as wrong",
        "cut         30 replies end at the limit of 28 new tokens; --max-new-tokens raises it",
        "speed       16.00 examples/s, 1,200 replies in 1m 15s",
    ]
    own = {"new": {"score": 0.75, "interval": [0.5, 1.0], "questions": 600}}
    results = {**results, "sources": own, "compared": {**results["compared"], "sources": {"new": {"score": 0.125}}}}
    own = labelled(*summary(results)[1])
    assert own == "  new       0.7500 (95% 0.5000 to 1.0000), 600 questions; compared: 0.1250"


def test_each_source_has_its_score():
    """The task's own: of a mean of groups, the mean of the groups that the source has."""
    task = find_task("chartqa")
    own = records("1", "x", "3", "x", "5", "6")
    for record, source, group in zip(
        own, "aaabbb", ("human", "human", "augmented", "human", "human", "human"), strict=True
    ):
        record |= {"source": source, "group": group}
    asked = [Asked((answer,), group=record["group"]) for answer, record in zip("123456", own, strict=True)]
    scored = score_records(task, asked, own)
    assert list(scored.sources) == ["a", "b"]
    first, second = scored.sources.values()
    assert (first.score, first.questions) == (pytest.approx(0.75), 3)
    assert (second.score, second.questions) == (pytest.approx(2 / 3), 3)
    assert second.interval.low <= 2 / 3 <= second.interval.high <= 1
    assert scored.total == pytest.approx((3 / 5 + 1) / 2)
    told = scored.summary()["sources"]["b"]
    assert told == {"score": second.score, "interval": list(second.interval), "questions": 3}


def test_one_source_has_no_score_of_its_own():
    scored = score_records(custom_task("exact_match"), [Asked(("a",))], records("a"))
    assert scored.sources == {} and scored.summary()["sources"] == {}
