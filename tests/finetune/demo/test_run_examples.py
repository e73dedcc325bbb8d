"""Examples of a run: what it recorded of its evaluation rows."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from finetune.demo.run_examples import find_run, read_examples
from finetune.errors import UserError
from qwenvl.checkpoint.record import ModelRecord

ANSWER = {"target": "Ann", "prediction": "Bob"}
VQA = ModelRecord(prompts={"vqa": ("{question} Briefly.",)})


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run, without predictions."""
    folder = tmp_path / "run"
    (folder / "predictions").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    for name in ("a", "b"):
        Image.new("RGB", (30, 20)).save(folder / "predictions" / f"{name}.jpg")
    return folder


def write(run: Path, *records: dict, **of_all: object) -> None:
    usual = {"when": "after", "origin": "rows.jsonl, row 1", "question": "Who?", "images": ["predictions/a.jpg"]}
    lines = [json.dumps({**usual, **ANSWER, **of_all, **record}) for record in records]
    (run / "predictions.jsonl").write_text("\n".join(lines) + "\n")


def read(run: Path, tmp_path: Path, record: ModelRecord = VQA):
    page = tmp_path / "page"
    page.mkdir(exist_ok=True)
    return read_examples(run, record, page)


def test_a_row_has_its_answers_and_its_replies(run, tmp_path):
    write(run, {"when": "before"}, {"when": "after", "prediction": "Ann", "others": ["Anna"]})
    evaluated = run / "evaluations" / "docvqa"
    evaluated.mkdir(parents=True)
    record = {"number": 0, "origin": "rows.jsonl, row 1", "question": "Who?", "reply": "Ann."}
    (evaluated / "predictions.jsonl").write_text(json.dumps(record) + "\n")
    (example,) = read(run, tmp_path)
    assert example.answers[0] == "Ann" and example.images == (run / "predictions" / "a.jpg",)
    assert example.recorded == (
        ("before training", "Bob"),
        ("after training", "Ann"),
        ("by finetune evaluate, docvqa", "Ann."),
    )
    assert example.thumbnail.parent == tmp_path / "page" and example.thumbnail.is_file()


def test_the_question_is_taken_out_of_the_prompt_of_training(run, tmp_path):
    write(run, {"question": "Who? Briefly."}, {"origin": "row 2", "question": "Something else"})
    first, second = read(run, tmp_path)
    assert (first.question, first.template) == ("Who?", "{question} Briefly.")
    assert (second.question, second.template) == ("Something else", None)


@pytest.mark.parametrize(
    ("source", "question", "asked"),
    [
        ({"format": "vqa", "prompt": "Q: {question}"}, "Who?", ("Who?", "Q: {question}")),
        ({"format": "vqa"}, "Who?", ("Who?", "{question}")),
        ({"format": "messages"}, "Who?", ("Who?", None)),
    ],
)
def test_a_question_of_a_task_is_asked_by_the_prompt_of_its_source(source, question, asked, run, tmp_path):
    data = {"path": "rows.jsonl", **source}
    recipe = {
        "model": {"path": "examples/nano"},
        "adapter": {"r": 4},
        "data": {"train": [data]},
        "evaluate": {
            "data": [{**data, "name": "other", "prompt": None}, {**data, "name": "mine"}],
            "task": "custom",
            "metric": "anls",
        },
        "output": str(run),
    }
    if source["format"] == "vqa":
        recipe["evaluate"] = {**recipe["evaluate"], "task": "docvqa", "metric": None}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write(run, {"question": question, "metric": "anls", "score": 1.0, "source": "mine"})
    (example,) = read(run, tmp_path)
    assert (example.question, example.template) == asked


def test_rows_that_cannot_be_asked_again_are_left_out(run, tmp_path):
    outside = tmp_path / "secret.jpg"
    Image.new("RGB", (30, 20)).save(outside)
    (run / "predictions" / "bad.jpg").write_bytes(b"no image")
    (run / "predictions" / "link.jpg").symlink_to(outside)
    write(
        run,
        {"origin": "row 1", "images": ["predictions/gone.jpg"]},
        {"origin": "row 2", "images": ["../secret.jpg"]},
        {"origin": "row 3", "images": [str(outside)]},
        {"origin": "row 4", "images": ["predictions/link.jpg"]},
        {"origin": "row 5", "images": ["predictions/bad.jpg"]},
        {"origin": "row 6", "images": []},
        {"origin": "row 7", "question": " "},
        {"origin": "row 8", "images": ["predictions/a.jpg", "predictions/b.jpg"]},
    )
    (example,) = read(run, tmp_path)
    assert example.origin == "row 8" and len(example.images) == 2


def test_a_run_without_recorded_replies_has_no_examples(run, tmp_path):
    assert read(run, tmp_path) == []


@pytest.mark.parametrize("line", ["{", "[1]", '"x"'])
def test_a_damaged_line_is_refused_by_its_number(line, run, tmp_path):
    write(run, {})
    with (run / "predictions.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(UserError, match="line 3: is damaged"):
        read(run, tmp_path)


def test_the_run_of_a_model_is_found(run, tmp_path):
    (run / "adapter").mkdir()
    other = tmp_path / "checkpoint"
    other.mkdir()
    assert find_run(str(run)) == run
    assert find_run(str(run / "adapter")) == run.resolve()
    assert find_run(str(other)) is None and find_run("Qwen/Qwen-VL-Chat") is None
