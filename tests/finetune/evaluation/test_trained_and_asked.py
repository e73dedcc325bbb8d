"""Rows that are trained on can be asked: columns of any name, boxes at the edge, several boxes."""

import json

import pytest
from PIL import Image
from questions_for_tests import ask, source, write
from recipes_for_tests import write_recipe
from said import collect

from finetune.data.formats.row_format import COLUMNS
from finetune.data.sample import DataError
from finetune.data.samples import Samples
from finetune.evaluation.tasks import custom_task
from finetune.recipe import load_recipe
from finetune.recipe.sources import ROLES
from finetune.training.train import train
from qwenvl.text.grounding import strip_markup

SAID = [{"from": "user", "value": "Picture 1: <img>a.png</img>\nWhat?"}, {"from": "assistant", "value": "4"}]
LLAVA = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "4"}]
CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "4"}]
OBJECTS = {"ref": [], "bbox": [[20, 10, 40, 20]]}
# Rows that use every role of their format, where roles go together.
ROWS = {
    "messages": [
        {"messages": CHAT, "images": ["a.png"], "system": "Be brief."},
        {"prompt": CHAT[:1], "completion": CHAT[1:], "images": ["a.png"]},
    ],
    "qwen_json": [{"conversations": SAID, "system": "Be brief."}],
    "llava": [{"image": "a.png", "conversations": LLAVA, "system": "Be brief."}],
    "swift": [
        {
            "query": "<image>Where?",
            "response": "There: <bbox>",
            "history": [["Hi", "Yes?"]],
            "system": "Be brief.",
            "images": ["a.png"],
            "objects": OBJECTS,
        },
        {"messages": [{"role": "user", "content": "<image>What?"}, CHAT[1]], "images": ["a.png"]},
    ],
    "texts": [{"images": ["a.png"], "texts": [{"user": "What?", "assistant": "4"}], "system": "Be brief."}],
    "vqa": [{"image": "a.png", "question": "What?", "answers": ["4"]}],
    "grounding": [
        {"image": "a.png", "phrase": "cat", "box": [20, 10, 40, 20]},
        {"image": "a.png", "phrase": "cats", "boxes": [[20, 10, 40, 20]], "labels": ["cat"]},
    ],
    "caption": [{"image": "a.png", "caption": "4"}],
}


def own(role):
    return f"own_{role}"


@pytest.mark.parametrize("row_format", ROWS)
def test_columns_of_other_names_train_and_evaluate(tmp_path, row_format):
    """Of every role: the recipe's roles, those that are trained on, and those that are asked are the same ones."""
    assert set(ROLES[row_format]) == set(COLUMNS[row_format])
    used = {role for row in ROWS[row_format] for role in row}
    assert used == set(COLUMNS[row_format]), "the rows above use all of them"
    metric = "detection" if row_format == "grounding" else "anls"
    more = {"box_form": "xyxy"} if row_format == "grounding" else {}
    columns = {role: own(role) for role in COLUMNS[row_format]}
    both = []
    for renamed in (False, True):
        rows = [{own(role) if renamed else role: value for role, value in row.items()} for row in ROWS[row_format]]
        given = {"columns": columns if renamed else {}, **more}
        questions = ask(tmp_path, custom_task(metric, format=row_format), *rows, source_with=given)
        samples = Samples([source(write(tmp_path, rows), format=row_format, **given)])
        assert not questions.notes and not any(sample.unread for sample in samples)
        said = [(question.messages, question.answers, list(question.images)) for question in questions]
        both.append((said, [sample.messages for sample in samples]))
    assert both[0] == both[1]
    for (asked, answers, _), trained in zip(*both[0], strict=True):
        texts = [part["text"] for turn in asked for part in turn["content"] if part["type"] == "text"]
        learned = [turn["content"] for turn in trained]
        flat = [part["text"] for one in learned if not isinstance(one, str) for part in one if part["type"] == "text"]
        reply = trained[-1]["content"]
        assert strip_markup(reply if isinstance(reply, str) else reply[0]["text"]) == strip_markup(answers[0])
        assert all(text in "".join(flat) + "".join(one for one in learned if isinstance(one, str)) for text in texts)


# Of an image of 200 x 100 pixels.
@pytest.mark.parametrize(
    ("box", "answer", "why"),
    [
        ([100, 50, 200, 100], "<box>(500,500),(999,999)</box>", None),
        ([-0.4, 0, 200.6, 100.9], "<box>(0,0),(999,999)</box>", None),
        ([0.5, 0.25, 2, 4], "<box>(2,2),(10,40)</box>", None),
        ([100, 50, 202, 100], None, "reaches 2 pixels beyond the image of 200 x 100"),
        ([0.5, 0.25, 0.75, 1], None, "lies within the first pixel of the image of 200 x 100"),
        ([201, 1, 210, 2], None, "wholly outside"),
        ([40, 10, 20, 20], None, "wrong way round"),
        ([1, 1, 9, 1, 9, 9, 1, 9], None, "has four points"),
    ],
)
@pytest.mark.parametrize("metric", ["grounding", "detection"])
def test_boxes_at_the_edge_are_the_same_to_both(tmp_path, metric, box, answer, why):
    row = {"image": "a.png", "phrase": "x", "box": box}
    samples = Samples([source(write(tmp_path, [row]), format="grounding", box_form="xyxy")])
    task = custom_task(metric, format="grounding")
    if why is None:
        [question] = ask(tmp_path, task, row, source_with={"box_form": "xyxy"})
        assert samples[0].messages[-1]["content"] == question.answers[0] == answer
        assert task.score(question, answer) == 1.0
        return
    with pytest.raises(DataError) as caught:
        ask(tmp_path, task, row, source_with={"box_form": "xyxy"})
    assert why in str(caught.value)
    [bad] = samples.scan(0, 1)
    assert why in str(bad)


def test_the_boxes_of_public_data_are_taken_as_they_are(tmp_path):
    """The form of its boxes is known; some of them reach beyond their image."""
    row = {"image": "a.png", "answer": ["x"], "bbox": [150, 50, 60, 60], "question_id": 1}
    [question] = ask(tmp_path, "refcoco", row)
    assert question.box == (150, 50, 210, 110)


EDGE = "<ref>x</ref><box>(100,100),(1000,1000)</box>"


@pytest.mark.parametrize("metric", ["grounding", "detection"])
def test_1000_in_conversations_is_clamped_where_the_recipe_says_so(tmp_path, metric):
    turns = [{"role": "user", "content": "Where is <box>(0,0),(1000,9)</box>?", "grounding": True}]
    turns += [{"role": "assistant", "content": EDGE, "grounding": True}]
    task = custom_task(metric, format="messages")
    given = {"messages": turns, "images": ["a.png"]}
    [question] = ask(tmp_path, task, given, box_edge="clamp", grounding=True)
    assert question.answers == (EDGE.replace("1000", "999"),)
    assert "(999,9)" in question.messages[0]["content"][-1]["text"]
    assert task.score(question, EDGE) == task.score(question, question.answers[0]) == 1.0


def test_quads_of_conversations(tmp_path):
    """Trained as they are; all of them count in detection by the boxes around them, and none where one box counts."""
    quad = "<quad>(100,100),(300,200),(300,500),(100,400)</quad>"
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": f"<ref>x</ref>{quad}"}]
    row = {"messages": turns, "images": ["a.png"]}
    task = custom_task("detection", format="messages")
    [question] = ask(tmp_path, task, row, grounding=True)
    assert [box.box for box in question.objects.boxes] == [(20, 10, 60, 50)]
    assert task.score(question, "<box>(100,100),(300,500)</box>") == 1.0
    with pytest.raises(DataError, match="holds no box"):
        ask(tmp_path, custom_task("grounding", format="messages"), row, grounding=True)


@pytest.fixture
def boxes(tmp_path):
    """A recipe that trains and evaluates on rows of no box, one and several."""
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "phrase": "cat", "boxes": own} for own in ([], [[20, 10, 40, 20]], [[0, 0, 9, 9]] * 2)]
    for name in ("train", "eval"):
        (tmp_path / f"{name}-boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_on, asked = (
        {"path": str(tmp_path / f"{name}-boxes.jsonl"), "format": "grounding", "box_form": "xyxy"}
        for name in ("train", "eval")
    )
    settings = {
        "train__max_steps": 1,
        "train__eval_strategy": "steps",
        "train__eval_steps": 1,
        "data__train": train_on,
    }
    settings |= {"data__images_root": None, "train__save_strategy": "no", "train__load_best_model_at_end": False}
    evaluate = {"data": asked, "task": "custom", "metric": "detection", "predictions": 1, "max_new_tokens": 40}
    return write_recipe(tmp_path, **settings, evaluate=evaluate)


def test_a_run_scores_all_boxes(boxes):
    said = []
    run = train(load_recipe(boxes), say=collect(said))
    score = json.loads((run / "run.json").read_text())["score"]
    assert score["metric"] == "detection" and score["questions"] == 3
    counts = score["boxes"]["after"]
    assert counts["missed"] + counts["found"] == 3
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_detection" in record for record in logged)
    assert any(line.startswith("detection ") and "all boxes" in line for line in said)


def test_a_run_that_scores_one_box_refuses_others(boxes):
    with pytest.raises(DataError, match=r"(?s)boxes.jsonl, row 1, boxes: holds no box.*row 3, boxes: holds 2 boxes"):
        train(load_recipe(boxes, ["evaluate.metric=grounding"]), say=collect([]))
