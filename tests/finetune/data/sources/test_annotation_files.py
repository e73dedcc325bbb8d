"""Annotation exports as files and keys of a recipe: what is refused, and what each layout has of its own."""

from pathlib import Path

import pytest
import yaml
from exports_for_tests import (
    CAR,
    COCO,
    CVAT,
    LABEL_STUDIO,
    QUESTIONS,
    SIGN,
    VIA,
    YOLO_NAMES,
    asked_and_told,
    changed,
    problem_of,
    samples_of,
    write_export,
    write_images,
)
from exports_for_tests import read_export as read

from finetune.data.sample import BadRow, DataError
from finetune.data.samples import Samples
from finetune.errors import MissingFileError
from finetune.recipe.sources import LAYOUTS, Source


@pytest.mark.parametrize(
    ("layout", "content", "said"),
    [
        ("coco", [{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}], "what a detector found"),
        ("coco", {"images": []}, "there is no list 'annotations'"),
        ("coco", changed(COCO, "categories", None), "there is no list 'categories'"),
        ("coco", changed(COCO, "images", 1, "id", 1), "two images have the id 1"),
        ("coco", changed(COCO, "images", 0, "id", True), "must be an object with an id"),
        ("coco", changed(COCO, "categories", 1, "id", 3), "two categories have the id 3"),
        ("coco", changed(changed(COCO, "images", 0, "id", "1"), "images", 1, "id", "2"), "is the id of an image"),
        ("coco", {**COCO, "annotations": [{"image_id": 1, "caption": "A car."}]}, "there are no boxes in its annot"),
        ("coco", "{", "not JSON"),
        ("coco", '{"images": [NaN]}', "NaN is no JSON"),
        ("coco", "[" * 100_000, "nested too deeply"),
        ("label_studio", {}, "must hold a list of tasks"),
        ("label_studio", [{"id": 1, "image": "a.jpg", "label": [], "annotator": 1}], "this is JSON-MIN"),
        ("labelme", {"a": 1}, "there is no JSON file of LabelMe"),
        ("cvat", "<annotation/>", "its root is <annotation>, and must be <annotations>"),
        ("cvat", "<annotations><track id='0'/></annotations>", "holds tracks of a video"),
        ("cvat", "<annotations><version>1.1</version></annotations>", "holds no <image>"),
        ("cvat", CVAT.replace("<annotations>", "<!DOCTYPE a><annotations>"), "document type or entities"),
        ("cvat", '<!DOCTYPE a [<!ENTITY b "bbbb">]><annotations><image name="&b;"/></annotations>', "document type"),
        ("cvat", CVAT.replace("utf-8", "klingon"), "encoding"),
        ("cvat", CVAT[:-20], "not XML (line"),
        ("cvat", "<annotations>" + "<a>" * 40, "nested deeper than 32"),
        ("via", {"project": {}, "config": {}, "metadata": {}}, "is of VIA 3"),
        ("via", {"a": {"filename": "a.jpg"}}, "holds neither a project of VIA 2"),
        ("via", changed(VIA, "a.jpg100", "regions", 0, "region_attributes", "note", "x"),
         "several attributes, kind, note"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_of_the_layout_is_refused(tmp_path, layout, content, said):
    with pytest.raises(DataError) as caught:
        read(tmp_path, layout, content)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_there(tmp_path, layout):
    with pytest.raises(MissingFileError, match="there is no file or folder"):
        samples_of(tmp_path / "gone" / "x", layout)
    if layout not in ("labelme", "yolo"):
        with pytest.raises(DataError, match="is a file, and this is a folder"):
            samples_of(tmp_path, layout)


def test_via_takes_the_attribute_that_is_told_and_version_1(tmp_path):
    content = changed(VIA, "a.jpg100", "regions", 0, "region_attributes", "note", "old")
    assert asked_and_told(read(tmp_path, "via", content, label="kind")) == [CAR, SIGN]
    with pytest.raises(DataError, match="no region has 'kin' but kind, note"):
        read(tmp_path, "via", content, label="kin")
    regions = VIA["a.jpg100"]["regions"]
    first = changed(VIA, "a.jpg100", "regions", {"0": regions[0], "1": regions[1]})
    assert asked_and_told(read(tmp_path, "via", {"_via_img_metadata": first, "_via_settings": {}})) == [CAR, SIGN]
    both = changed(
        VIA, "a.jpg100", "regions", 0, "region_attributes", "kind", {"car": True, "red": True, "bus": False}
    )
    assert [asked for _, asked, _ in asked_and_told(read(tmp_path, "via", both))] == [
        "<ref>car</ref>", "<ref>red</ref>", "<ref>sign</ref>",
    ]  # fmt: skip


def test_coco_captions(tmp_path):
    content = {**COCO, "annotations": [{"image_id": 2, "caption": "A car."}, {"image_id": 2, "caption": "Red."}]}
    samples = read(tmp_path, "coco", content, format="caption", prompt="Describe:")
    assert asked_and_told(samples) == [("b.jpg", "Describe:", "A car."), ("b.jpg", "Describe:", "Red.")]
    assert "1 images without a caption" in samples.notes[0]
    with pytest.raises(DataError, match="there are no captions in its annotations; for the rest of it there is"):
        read(tmp_path, "coco", format="caption")


def test_label_studio_answers(tmp_path):
    samples = read(tmp_path, "label_studio", format="vqa", questions=QUESTIONS, classes={"Y": "yes"})
    assert asked_and_told(samples) == [
        ("a.jpg", "What is the total?", "$ 12.40"),
        ("a.jpg", "Is it paid?", "yes"),
    ]
    assert "1 images without an answer; 2 results of type rectanglelabels" in samples.notes[0]
    with pytest.raises(DataError, match="nothing says which question paid answers"):
        read(tmp_path, "label_studio", format="vqa", questions={"text": "Which?"})
    with pytest.raises(DataError, match="no text area or choice named txt"):
        read(tmp_path, "label_studio", format="vqa", questions={**QUESTIONS, "txt": "Which?"})
    one = read(tmp_path, "label_studio", format="vqa", questions={"text": "Which?", "paid": None})
    assert asked_and_told(one) == [("a.jpg", "Which?", "$ 12.40")] and "1 answers of paid" in one.notes[0]
    two = changed(LABEL_STUDIO, 0, "annotations", 0, "result", 2, "value", {"text": ["a", "b"]})
    assert "holds 2 texts" in problem_of(read(tmp_path, "label_studio", two, format="vqa", questions=QUESTIONS)).reason
    hole = read(tmp_path, "label_studio", format="vqa", questions={"text": "{gone}?", "paid": None})
    assert "needs data.gone, and the task has none" in problem_of(hole).reason


def test_label_studio_reads_the_accepted_annotation_or_the_first(tmp_path):
    sign = LABEL_STUDIO[0]["annotations"][0]["result"][1]
    car = LABEL_STUDIO[0]["annotations"][0]["result"][0]
    several = [{"was_cancelled": True, "result": []}, {"result": [sign]}, {"result": [car]}]
    samples = read(tmp_path, "label_studio", changed(LABEL_STUDIO, 0, "annotations", several))
    assert asked_and_told(samples) == [SIGN]
    assert "1 cancelled annotations; 1 further annotations of a task" in samples.notes[0]
    several[2]["ground_truth"] = True
    assert asked_and_told(read(tmp_path, "label_studio", changed(LABEL_STUDIO, 0, "annotations", several))) == [CAR]


def test_label_studio_labels_in_a_result_of_their_own(tmp_path):
    """The template for OCR: a rectangle, its labels and its text are three results of one id."""
    value = {"x": 10, "y": 10, "width": 40, "height": 40, "rotation": 0}
    size = {"original_width": 640, "original_height": 480}
    results = [
        {"id": "r", "type": "rectangle", "value": value, **size},
        {"id": "r", "type": "labels", "value": {**value, "labels": ["car"]}, **size},
        {"id": "r", "type": "textarea", "value": {**value, "text": ["x"]}, **size},
        {"id": "s", "type": "rectangle", "value": value, **size},
    ]
    samples = read(tmp_path, "label_studio", changed(LABEL_STUDIO, 0, "annotations", 0, "result", results))
    assert asked_and_told(samples) == [CAR]
    assert "1 regions without a label; 1 results of type textarea" in samples.notes[0]


def test_yolo_folders(tmp_path):
    """A split of data.yaml; images/val without it; labels beside the images; names from classes.txt or the recipe."""
    path = write_export(tmp_path / "one", "yolo")
    assert len(samples_of(path / "data.yaml", "yolo", split="train")) == 2
    with pytest.raises(DataError, match="has no split 'val' but train: set split"):
        samples_of(path, "yolo", split="val")
    (path / "data.yaml").write_text(YOLO_NAMES.replace("nc: 2", "nc: 3"))
    with pytest.raises(DataError, match="`nc` is 3, and there are 2 names"):
        samples_of(path, "yolo")
    (path / "data.yaml").unlink()
    with pytest.raises(DataError, match="nothing says what class 0, 1 is"):
        samples_of(path, "yolo")
    assert [asked for _, asked, _ in asked_and_told(samples_of(path, "yolo", classes={0: "car", 1: "sign"}))] == [
        "<ref>car</ref>", "<ref>sign</ref>",
    ]  # fmt: skip

    other = tmp_path / "two"
    write_images(other, "images/val/a.jpg", "images/train/b.jpg")
    (other / "labels" / "val").mkdir(parents=True)
    (other / "labels" / "val" / "a.txt").write_text("0 0.3 0.3 0.4 0.4\n")
    (other / "classes.txt").write_text("car\nsign\n")
    assert asked_and_told(samples_of(other, "yolo", split="val")) == [CAR]
    (other / "images" / "val" / "a.png").write_bytes((other / "images" / "val" / "a.jpg").read_bytes())
    with pytest.raises(BadRow, match=r"a.png and a.jpg have one label file"):
        list(samples_of(other, "yolo", split="val"))

    beside = tmp_path / "three"
    write_images(beside, "a.jpg")
    (beside / "a.txt").write_text("1 0.55 0.05 0.1 0.1\n")
    (beside / "obj.names").write_text("car\nsign\n")
    assert asked_and_told(samples_of(beside, "yolo")) == [SIGN]


# --- the recipe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"format": "vqa", "annotations": {"layout": "coco"}}, "set format: grounding or caption"),
        ({"format": "grounding", "annotations": {"layout": "coco"}, "box_form": "xywh"}, "remove box_form"),
        ({"format": "grounding", "annotations": {"layout": "coco"}, "split": "train"}, "remove split"),
        ({"format": "grounding", "annotations": {"layout": "coco", "rows": "image"}}, "set prompt to what is asked"),
        ({"format": "grounding", "annotations": {"layout": "coco"}, "prompt": "Find."}, "write {phrase} in it"),
        ({"format": "caption", "annotations": {"layout": "coco", "classes": {"a": None}}}, "remove classes"),
        ({"format": "vqa", "annotations": {"layout": "label_studio"}}, "name each with its question"),
        ({"format": "grounding", "annotations": {"layout": "label_studio", "questions": {"a": "b"}}},
         "remove questions"),
        ({"format": "grounding", "annotations": {"layout": "coco", "label": "kind"}}, "remove label"),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_together(given, said):
    with pytest.raises(ValueError) as caught:
        Source(path="x", **given)
    findings = [finding for error in caught.value.errors() for finding in error["ctx"]["findings"]]
    assert said in " ".join(finding.remedy for finding in findings)


def test_numbers_of_classes_are_read_from_yaml():
    annotations = yaml.safe_load("{layout: yolo, classes: {0: invoice number, logo: company logo, x: null}}")
    source = Source(path="x", format="grounding", annotations=annotations)
    assert source.annotations.classes == {"0": "invoice number", "logo": "company logo", "x": None}
    with pytest.raises(ValueError):
        Source(path="x", format="grounding", annotations={"layout": "yolo", "classes": {True: "x"}})
    assert Path(source.path) == Path("x")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_of_an_export_is_named_as_unread(tmp_path, layout):
    assert {sample.unread for sample in read(tmp_path, layout)} == {()}


def test_an_export_has_no_encoding_of_its_own(tmp_path):
    with pytest.raises(DataError, match=r"encoding is of text files; remove it"):
        source = Source(path=str(write_export(tmp_path, "coco")), format="grounding", annotations={"layout": "coco"})
        Samples([source.model_copy(update={"encoding": "gbk"})])


def test_a_key_twice_in_an_export_is_refused(tmp_path):
    file = write_export(tmp_path, "via")
    text = file.read_text()
    file.write_text(text.replace('"filename":', '"filename": "b.jpg", "filename":', 1))
    with pytest.raises(DataError, match=r"cannot be read as JSON \(the key 'filename' stands twice in one object\)"):
        samples_of(file, "via")
