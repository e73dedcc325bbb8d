"""Task custom with metric detection: from rows to scores, counts by name, the page and the lines at the end."""

import json

import pytest
from PIL import Image
from questions_for_tests import ask

from finetune.data.sample import DataError
from finetune.errors import UserError
from finetune.evaluation.detection_scores import detection_lines, detection_summary
from finetune.evaluation.page import write_evaluation_page
from finetune.evaluation.results import record_of, score_records, with_scores
from finetune.evaluation.tasks import check_prompt, custom_task, published_task
from finetune.replies.replies import Reply

CAT, DOG = "<box>(100,100),(200,200)</box>", "<box>(150,200),(400,500)</box>"
BOTH = f"<ref>cat</ref>{CAT}\n<ref>dog</ref>{DOG}"


def conversation(answer, question="Frame them."):
    value = f"Picture 1: <img>a.png</img>\n{question}"
    return {"conversations": [{"from": "user", "value": value}, {"from": "assistant", "value": answer}]}


def task(format="qwen_json", **given):
    return custom_task("detection", format=format, **given)


def records(questions, replies):
    made = [Reply(index=number, text=reply) for number, reply in enumerate(replies)]
    return [record_of(questions.task, reply.index, questions[reply.index], reply) for reply in made]


def scored(questions, replies):
    lines = records(questions, replies)
    return lines, score_records(questions.task, questions, lines)


def test_conversations_with_several_objects_and_with_none(tmp_path):
    rows = [
        conversation(BOTH),
        conversation(f"<ref>cat</ref>{CAT}{DOG}", "All cats."),
        conversation(CAT, "<ref>cat</ref>"),
        conversation("There is no pig.", "All pigs."),
        conversation("There is no pig.", "All pigs."),
    ]
    questions = ask(tmp_path, task(), *rows)
    assert [len(question.objects.boxes) for question in questions] == [2, 2, 1, 0, 0]
    assert [question.objects.names_count for question in questions] == [True, False, False, False, False]
    replies = [BOTH.replace("dog", "cow"), CAT + CAT + DOG, f"{DOG}{CAT}", "No.", CAT]
    lines, score = scored(questions, replies)
    assert score.values == pytest.approx([0.5, 0.8, 2 / 3, 1.0, 0.0])
    assert score.total == pytest.approx(sum(score.values) / 5)
    found = score.summary()["detection"]
    assert {key: found[key] for key in ("found", "extra", "missed")} == {"found": 4, "extra": 4, "missed": 1}
    assert (found["precision"], found["recall"]) == (0.5, 0.8)
    assert found["nothing"] == {"questions": 2, "right": 1}
    assert found["one_box"] == {"questions": 1, "accuracy": 0.0}, "the published score looks at the first box alone"
    assert {name: (one["found"], one["extra"], one["missed"]) for name, one in found["names"].items()} == {
        "cat": (4, 2, 0),
        "dog": (0, 0, 1),
        "": (0, 1, 0),
        "cow": (0, 1, 0),
    }
    said = dict(detection_lines(found))
    assert said["  all boxes"] == "precision 0.5000, recall 0.8000, F1 0.6154 (4 found, 4 too many, 1 missed)"
    assert said["  cow"].startswith("precision 0.0000, recall -, ")
    assert said["  no box"] == "1 of 2 questions with nothing to find have a reply without"
    assert all("unread" not in line for line in lines)


def test_columns_train_and_evaluate_alike(tmp_path):
    """The rows of tests/finetune/data/formats/test_grounding_boxes.py, asked."""
    cat, dog = [20, 10, 40, 20], [30, 20, 80, 50]  # of an image of 200 x 100 pixels
    rows = [
        {"image": "a.png", "phrase": "cats", "boxes": [cat, dog]},
        {"image": "a.png", "phrase": "pigs", "boxes": []},
        {"image": "a.png", "phrase": ["cat", "dog"], "boxes": [[cat], [dog]]},
        {"image": "a.png", "phrase": "animals", "boxes": [cat, dog], "labels": ["cat", "dog"]},
        {"image": "a.png", "phrase": ["car", "red car"], "box": cat},
    ]
    questions = ask(tmp_path, task("grounding"), *rows, source_with={"box_form": "xyxy"})
    texts = [question.messages[-1]["content"][-1]["text"] for question in questions]
    assert texts == [
        "<ref>cats</ref>",
        "<ref>pigs</ref>",
        "<ref>cat</ref>, <ref>dog</ref>",
        "<ref>animals</ref>",
        "<ref>car</ref>",
        "<ref>red car</ref>",
    ]
    answers = [question.answers[0] for question in questions]
    assert answers == [CAT + DOG, "[]", BOTH, BOTH, CAT, CAT]
    _, score = scored(questions, answers)
    assert score.values == [1.0] * 6
    assert list(score.detection["names"]) == ["cat", "cats", "dog", "car", "red car"]
    _, score = scored(questions, [CAT + DOG] * 6)
    assert score.values[2:4] == [0.0, 0.0], "names count where there are several"


def test_a_prompt_without_a_phrase_asks_for_all(tmp_path):
    row = {"image": "a.png", "boxes": [[20, 10, 40, 20]], "labels": ["cat"]}
    asks_all = task("grounding", prompt="Frame everything.")
    [question] = ask(tmp_path, asks_all, row, source_with={"box_form": "xyxy"})
    assert question.text == "Frame everything." and question.answers == (f"<ref>cat</ref>{CAT}",)
    assert asks_all.score(question, f"<ref>dog</ref>{CAT}") == 0.0 < asks_all.score(question, f"<ref>Cat</ref>{CAT}")
    [hidden] = ask(tmp_path, asks_all, {**row, "boxes": None}, source_with={"box_form": "xyxy"})
    assert hidden.answers == () and hidden.objects is None
    with pytest.raises(UserError, match=r"must hold \{phrase\}"):
        check_prompt(custom_task("grounding", format="grounding"), "Frame everything.")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("<ref>cat</ref><box>(0.1,0.1),(0.4,0.4)</box>", "malformed grounding markup: <box> holds '(0.1,0.1)"),
        (CAT + "<box>(1,1),(4000,9)</box>", "coordinate 4000 is outside"),
    ],
)
def test_a_gold_reply_that_cannot_be_read_is_refused(tmp_path, answer, reason):
    with pytest.raises(DataError, match="cannot be asked") as caught:
        ask(tmp_path, task(), conversation(answer))
    assert reason in str(caught.value)


@pytest.mark.parametrize("metric", ["grounding", "click"])
def test_metrics_of_one_box_refuse_rows_with_others(tmp_path, metric):
    row = {"image": "a.png", "phrase": "cats", "boxes": [[20, 10, 40, 20], [30, 20, 80, 50]]}
    one_box = custom_task(metric, format="grounding")
    for given, held in (row, "holds 2 boxes"), ({**row, "boxes": []}, "holds no box"):
        with pytest.raises(DataError) as caught:
            ask(tmp_path, one_box, given, source_with={"box_form": "xyxy"})
        assert f"{held}, and metric {metric} compares one: use metric detection" in str(caught.value)
    with pytest.raises(DataError, match="its last reply holds 2 boxes, and metric"):
        ask(tmp_path, custom_task(metric, format="qwen_json"), conversation(BOTH))
    [single] = ask(tmp_path, one_box, {**row, "boxes": [[20, 10, 40, 20]]}, source_with={"box_form": "xyxy"})
    assert one_box.score(single, CAT) == 1.0


def test_1000_is_the_edge(tmp_path):
    row = conversation("<box>(0,0),(1000,1000)</box>", "In <box>(0,0),(1000,500)</box>")
    [question] = ask(tmp_path, task(), row)
    assert question.objects.boxes[0].box == (0, 0, 199.8, 99.9)
    [question] = ask(tmp_path, task(), row, box_edge="clamp")
    assert question.answers == ("<box>(0,0),(999,999)</box>",)
    assert "(999,500)" in question.messages[-1]["content"][-1]["text"]


def test_replies_that_cannot_be_read_are_told(tmp_path):
    [question] = ask(tmp_path, task(), conversation(CAT))
    assert task().unread(question, "<box>(1,2),(3</box>") == "hold box markup that cannot be read"
    assert task().unread(question, "") is task().unread(question, "None.") is task().unread(question, CAT) is None


def test_the_published_scripts_have_no_such_metric():
    with pytest.raises(UserError, match="nothing like task custom"):
        published_task(task("grounding"))


def test_an_unreadable_image_finds_nothing(tmp_path):
    questions = ask(tmp_path, task(), conversation(CAT), conversation("None."))
    lines = [{**line, "unreadable": "is damaged"} for line in records(questions, ["", ""])]
    score = score_records(questions.task, questions, lines)
    assert score.values == [0.0, 0.0]
    found = detection_summary(questions.task, questions, lines)
    assert (found["missed"], found["nothing"]["right"], found["one_box"]["accuracy"]) == (1, 0, 0.0)


def test_the_page_has_all_boxes_and_their_names(tmp_path):
    questions = ask(tmp_path, task(), conversation(BOTH), conversation("None."))
    lines, score = scored(questions, [BOTH.replace("dog", "<b>cow"), CAT])
    results = {
        "task": "custom",
        "model": "m",
        "metric": "detection",
        "questions": 2,
        "of": 2,
        "unread": {},
        "cut": 0,
        "notes": [],
        "unreadable": [],
        "left_out": [],
        "identity": {},
        "environment": {},
        "settings": {"asked": "so", "max_new_tokens": 9},
        **score.summary(),
    }
    shown = with_scores(lines, score)
    text = write_evaluation_page(tmp_path, json.loads(json.dumps(results)), questions, shown).read_text()
    assert "<h2>Boxes</h2>" in text and "all boxes" in text and "&lt;b&gt;cow" in text
    assert "Replies without a box, to questions with nothing to find: 0 of 1." in text
    assert Image.open(tmp_path / "a.png").size == (200, 100)
