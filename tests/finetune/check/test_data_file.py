"""`finetune check FILE`: the format of each layout is found, and the section that is proposed reads the rows."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from finetune.cli import main
from finetune.data.samples import Samples
from finetune.recipe.sections import Source

USER, ASSISTANT = {"role": "user", "content": "Hi<image>"}, {"role": "assistant", "content": "Hello"}
HUMAN, GPT = {"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Hello"}
TAGGED = [{"from": "user", "value": "<img>a.png</img>Hi"}, {"from": "assistant", "value": "Hello"}]
BOX = "<ref>it</ref><box>(1,2),(3,4)</box>"
LAYOUTS = {
    "messages": ({"messages": [USER, ASSISTANT], "images": ["a.png"]}, {"format": "messages"}),
    "image": (
        {"messages": [USER, ASSISTANT], "image": "a.png"},
        {"format": "messages", "columns": {"images": "image"}},
    ),
    "boxes": (
        {"messages": [USER, {**ASSISTANT, "content": BOX}], "images": ["a.png"]},
        {"format": "messages", "grounding": True},
    ),
    "objects": (
        {
            "messages": [USER, {**ASSISTANT, "content": "<bbox>"}],
            "images": ["a.png"],
            "objects": {"bbox": [[1, 2, 3, 4]]},
        },
        {"format": "swift"},
    ),
    "llava": ({"id": "1", "image": "a.png", "conversations": [HUMAN, GPT]}, {"format": "llava"}),
    "sharegpt": ({"images": ["a.png"], "conversations": [HUMAN, GPT], "system": "Be short."}, {"format": "llava"}),
    "qwen_json": ({"conversations": TAGGED}, {"format": "qwen_json"}),
    "swift": ({"query": "Hi", "response": "Hello", "history": [["A<image>", "B"]], "images": ["a.png"]},) * 1
    + ({"format": "swift"},),
    "texts": ({"images": ["a.png"], "texts": [{"user": "Hi", "assistant": "Hello"}]}, {"format": "texts"}),
    "vqa": (
        {"file": "a.png", "Query": "What?", "label": ["x"]},
        {"format": "vqa", "columns": {"image": "file", "question": "Query", "answers": "label"}},
    ),
    "answer": ({"image": "a.png", "question": ["What?", "Why?"], "answer": ["x", "y"]}, {"format": "vqa"}),
    "xyxy": ({"image": "a.png", "phrase": "x", "box": [10, 10, 12, 50]}, {"format": "grounding", "box_form": "xyxy"}),
    "xywh": (
        {"image": "a.png", "phrase": "x", "bbox": [30, 30, 5, 5]},
        {"format": "grounding", "columns": {"box": "bbox"}, "box_form": "xywh"},
    ),
    "caption": ({"image": "a.png", "caption": ["x", "y"]}, {"format": "caption"}),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    Image.new("RGB", (60, 50), "teal").save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*rows, name="rows.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def proposed(printed: str) -> dict:
    return yaml.safe_load(printed[printed.index("\ndata:") :])["data"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_proposed_section_reads_the_rows(layout, capsys):
    row, wanted = LAYOUTS[layout]
    assert main(["check", write(row, row)]) == 0
    data = proposed(capsys.readouterr().out)
    grounding = {key: data[key] for key in ("grounding",) if key in data}
    assert data["train"] | grounding == {"path": "rows.jsonl"} | wanted
    assert len(list(Samples([Source(**data["train"])]))) >= 2


def test_both_box_forms_that_fit_are_told(capsys):
    assert main(["check", write({"image": "a.png", "phrase": "x", "box": [1, 1, 9, 9]})]) == 0
    assert "box_form: xyxy  # or xywh: the rows fit both" in capsys.readouterr().out


def test_what_is_wrong_is_counted_and_ends_with_2(capsys):
    good, _ = LAYOUTS["messages"]
    marked = {**good, "messages": [USER, {**ASSISTANT, "loss": False}, {**USER, "content": "Hi"}, ASSISTANT]}
    bad = [{**good, "images": ["gone.png"]}, {**good, "tools": ["x"]}]
    assert main(["check", write(good, {**marked, "notes": "x"}, *bad), "--samples", "1"]) == 2
    printed = capsys.readouterr()
    for line in (
        "format      messages: 2 of 4 rows looked at fit",
        "samples     2 can be used, with 2 images",
        "replies     2 trained, 1 marked as context",
        "not read    notes (1 row)",
        "row         rows.jsonl, row 1",
        "            user: Hi[a.png]",
        "problems    2",
    ):
        assert line in printed.out.splitlines()
    assert "rows.jsonl, row 3, images[0]: there is no file" in printed.out
    assert printed.err == "rows.jsonl: 2 rows cannot be used: mend them, or leave them out (data.on_bad_row: skip)\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([write, {"a": 1}], "no format has such columns"),
        ([write, {"messages": [USER]}], "messages comes nearest"),
        ([write], "holds no rows"),
        ([write, {"a": 1}, "--images"], "--images go with a recipe"),
        ([write, {"a": 1}, "data.max_length=3"], "is data: keys"),
    ],
)
def test_what_cannot_be_read(arguments, said, capsys):
    make, *rest = arguments
    rows = [item for item in rest if isinstance(item, dict)]
    assert main(["check", make(*rows), *(item for item in rest if isinstance(item, str))]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_of_images_with_metadata(capsys):
    Path("scans").mkdir()
    Path("a.png").rename("scans/a.png")
    Path("scans/metadata.csv").write_text("file_name,question,answers\na.png,Paid?,yes\n")
    assert main(["check", "scans"]) == 0
    assert proposed(capsys.readouterr().out) == {"train": {"path": "scans", "format": "vqa"}}
