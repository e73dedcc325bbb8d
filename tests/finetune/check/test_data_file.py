"""`finetune check FILE`: the format of each layout is found, and the section that is proposed reads the rows."""

import json
from pathlib import Path

import pytest
import yaml
from exports_for_tests import LABEL_STUDIO, write_export
from PIL import Image
from recipes_for_tests import finetune, write_recipe

from finetune.check.export_layout import looks_like
from finetune.cli import main
from finetune.commands.check import is_data
from finetune.data.samples import Samples
from finetune.recipe.sources import Source

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
    "several boxes": (
        {"image": "a.png", "phrase": "x", "boxes": [[10, 10, 12, 50], [1, 1, 2, 2]]},
        {"format": "grounding", "box_form": "xyxy"},
    ),
    "labels": (
        {"image": "a.png", "boxes": [[10, 10, 12, 50]], "labels": ["x"]},
        {"format": "grounding", "box_form": "xyxy", "prompt": "Find all objects."},
    ),
    "fields": (
        {"file": "a.png", "invoice": "007", "total": 12.4},
        {"format": "fields", "columns": {"image": "file"}, "fields": ["invoice", "total"], "reply": "json"},
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
        ([write, {"a": 1}, "encoding=klingon"], "'klingon' is no encoding that is known"),
        ([write, {"a": 1}, "rows.jsonl"], "are given as one pattern, in quotes"),
    ],
)
def test_what_cannot_be_read(arguments, said, capsys):
    make, *rest = arguments
    rows = [item for item in rest if isinstance(item, dict)]
    assert main(["check", make(*rows), *(item for item in rest if isinstance(item, str))]) == 2
    assert said in capsys.readouterr().err


def test_the_encoding_of_a_file_is_given_and_proposed(capsys):
    Image.new("RGB", (64, 64)).save("票据.png")
    text = "图片;问题;答案\n票据.png;这是什么？;这是票据\n票据.png;多少钱？;十二元\n"
    Path("rows.csv").write_bytes(text.replace("图片;问题;答案", "image;question;answers").encode("gbk"))
    assert main(["check", "rows.csv"]) == 2
    assert "give the file's encoding with `encoding`" in capsys.readouterr().err
    assert main(["check", "rows.csv", "encoding=gbk"]) == 0
    section = yaml.safe_load(capsys.readouterr().out.split("put this into a recipe:")[1])
    assert section["data"]["train"] == {"path": "rows.csv", "format": "vqa", "encoding": "gbk"}


@pytest.mark.parametrize(
    ("data", "images"), [("rows.jsonl", "scans"), ("rows.jsonl", "a/scans"), ("lists/rows.jsonl", "scans")]
)
def test_the_folder_of_the_images_is_found_where_it_is_clear(data, images, capsys):
    row = {"file": "x.png", "total": "3", "date": "May 4"}
    for path in (data, f"{images}/x.png"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(data).write_text(json.dumps(row) + "\n")
    Image.new("RGB", (64, 64)).save(f"{images}/x.png")
    assert main(["check", data]) == 0
    shown = capsys.readouterr().out
    assert f"images      from {images} (data.images_root)" in shown
    assert yaml.safe_load(shown.split("put this into a recipe:")[1])["data"]["images_root"] == images
    other = Path(images).with_name("other")
    other.mkdir()
    Image.new("RGB", (64, 64)).save(other / "x.png")
    assert main(["check", data]) == 2  # either may be meant
    assert "images_root" not in capsys.readouterr().out


def test_images_beside_the_folder_of_an_export_are_found(tmp_path, capsys):
    file = write_export(tmp_path, "coco")
    (tmp_path / "annotations").mkdir()
    moved = file.rename(tmp_path / "annotations" / file.name)
    assert main(["check", str(moved)]) == 0
    section = yaml.safe_load(capsys.readouterr().out.split("put this into a recipe:")[1])
    assert section["data"]["images_root"] == str(tmp_path)


def test_a_folder_of_images_with_metadata(capsys):
    Path("scans").mkdir()
    Path("a.png").rename("scans/a.png")
    Path("scans/metadata.csv").write_text("file_name,question,answers\na.png,Paid?,yes\n")
    assert main(["check", "scans"]) == 0
    assert proposed(capsys.readouterr().out) == {"train": {"path": "scans", "format": "vqa"}}


@pytest.mark.parametrize("layout", ["coco", "label_studio", "labelme", "cvat", "via", "yolo"])
def test_the_section_for_an_export_is_accepted_in_a_recipe(layout, tmp_path, capsys):
    content = None
    if layout == "label_studio":  # without the name that Label Studio puts before that of the file
        content = [{**LABEL_STUDIO[0], "data": {"image": "a.jpg", "what": "the total"}}]
    path = write_export(tmp_path / "e", layout, content)
    assert looks_like(path) == layout
    assert main(["check", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"looks like an annotation export of layout {layout}" in printed
    data = proposed(printed)
    assert data["train"]["annotations"]["layout"] == layout
    changes = {f"data__{key}": value for key, value in ({"images_root": None} | data).items()}
    checked = finetune("check", write_recipe(tmp_path, **changes), check=False)
    assert checked.returncode == 0, checked.stderr
    if layout == "yolo":
        assert main(["check", str(path / "data.yaml")]) == 0


def test_a_recipe_that_reads_an_export_as_rows_is_told_the_layout(tmp_path):
    path = write_export(tmp_path / "e", "coco")
    train = [{"path": str(path), "format": "messages"}]
    checked = finetune("check", write_recipe(tmp_path, data__train=train, data__images_root=None), check=False)
    assert checked.returncode == 2
    assert "looks like an annotation export, which `annotations: {layout: coco}` reads" in checked.stderr


def test_text_areas_alone_are_proposed_as_questions(tmp_path, capsys):
    task = {**LABEL_STUDIO[0], "data": {"image": "a.jpg"}}
    task["annotations"] = [{"was_cancelled": False, "result": task["annotations"][0]["result"][2:]}]
    assert main(["check", str(write_export(tmp_path / "e", "label_studio", [task]))]) == 0
    train = proposed(capsys.readouterr().out)["train"]
    assert train["format"] == "vqa" and train["annotations"]["questions"]["paid"] == "What is the paid?"


def test_packed_files_and_patterns(capsys):
    import gzip

    row, wanted = LAYOUTS["caption"]
    Path("rows.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    assert main(["check", "rows.jsonl.gz"]) == 0
    assert proposed(capsys.readouterr().out)["train"]["format"] == "caption"
    write(row, name="one.jsonl"), write(row, name="two.jsonl")
    assert main(["check", "*.jsonl"]) == 0
    assert proposed(capsys.readouterr().out)["train"] == {"path": "*.jsonl"} | wanted


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.bin", b"\0\1", "files of kind .bin are not read"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.json", b"\xff\xfe\0\1", "a.json"),
        ("gbk.jsonl", '{"image": "a.png", "caption": "\u53d1\u7968"}'.encode("gbk"), "give the file's encoding"),
        ("a.csv", b"image\na.png\n", "has images and no text"),
        ("none", None, "the folder holds neither"),
    ],
)
def test_what_nobody_can_read_ends_in_a_sentence(name, content, said, capsys):
    if content is None:
        Path(name).mkdir()
    else:
        Path(name).write_bytes(content)
    assert main(["check", name]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_rows_that_only_look_like_an_export_are_read_as_rows(capsys):
    row = {**LAYOUTS["caption"][0], "data": {"annotations": {"result": 1}}}
    Path("rows.json").write_text(json.dumps([row]))
    assert looks_like(Path("rows.json")) == "label_studio"
    assert main(["check", "rows.json"]) == 0
    printed = capsys.readouterr().out
    assert "but is none: " in printed and proposed(printed)["train"]["format"] == "caption"


def test_what_is_neither_export_nor_rows_is_told_as_the_export_it_looks_like(capsys):
    Path("i.json").write_text('{"images": [{"id": 1, "file_name": 3}], "annotations": [{"image_id": 1}]}')
    assert main(["check", "i.json"]) == 2
    printed = capsys.readouterr()
    assert "looks like an annotation export of layout coco" in printed.out and "i.json" in printed.err


@pytest.mark.parametrize(("text", "wanted"), [("names: [a]\n", True), ("names: [a]\nmodel: {path: x}\n", False)])
def test_a_yaml_is_a_recipe_unless_it_names_the_classes_of_a_yolo_folder(text, wanted):
    Path("data.yaml").write_text(text)
    assert is_data(Path("data.yaml")) is wanted
    assert is_data(Path("gone.yaml")) is False
