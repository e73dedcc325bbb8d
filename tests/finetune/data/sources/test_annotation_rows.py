"""Annotation exports: the boxes of each layout against values worked out by hand, and what is refused or left out."""

import copy
import json
from pathlib import Path

import pytest
import yaml
from exports_for_tests import (
    COCO,
    CVAT,
    LABEL_STUDIO,
    LABELME,
    QUESTIONS,
    VIA,
    YOLO_NAMES,
    asked_and_told,
    samples_of,
    write_export,
    write_images,
)
from PIL import Image

from finetune.data.sample import BadRow, DataError
from finetune.data.samples import Samples
from finetune.data.sources.exports.labelled import around_ellipse, around_turned
from finetune.errors import MissingFileError
from finetune.recipe.sources import LAYOUTS, Source

CAR = ("a.jpg", "<ref>car</ref>", "<box>(100,100),(500,500)</box>")
SIGN = ("a.jpg", "<ref>sign</ref>", "<box>(500,0),(600,100)</box>")
NOTHING = "[]"


def changed(document, *path_and_value):
    """A copy with the value at a path replaced; a path that ends one beyond a list adds to it."""
    *path, value = path_and_value
    found = copied = copy.deepcopy(document)
    for key in path[:-1]:
        found = found[key]
    if isinstance(found, list) and path[-1] == len(found):
        found.append(value)
    else:
        found[path[-1]] = value
    return copied


def read(folder, layout, content=None, **given):
    return samples_of(write_export(folder, layout, content), layout, **given)


def problem_of(samples) -> BadRow:
    """The problem of the first sample."""
    with pytest.raises(BadRow) as caught:
        samples[0]
    return caught.value


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_boxes(tmp_path, layout):
    samples = read(tmp_path, layout)
    assert asked_and_told(samples) == [CAR, SIGN]
    whole = read(tmp_path, layout, rows="image", prompt="Find all.")
    reply = "<ref>car</ref><box>(100,100),(500,500)</box>\n<ref>sign</ref><box>(500,0),(600,100)</box>"
    assert asked_and_told(whole) == [("a.jpg", "Find all.", reply)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_classes_are_renamed_or_left_out(tmp_path, layout):
    samples = read(tmp_path, layout, classes={"car": "the car", "sign": None})
    assert asked_and_told(samples) == [("a.jpg", "<ref>the car</ref>", CAR[2])]
    assert any("1 objects of classes that the recipe leaves out" in note for note in samples.notes)
    merged = read(tmp_path, layout, classes={"car": "thing", "sign": "thing"})
    assert asked_and_told(merged) == [("a.jpg", "<ref>thing</ref>", CAR[2] + SIGN[2])]
    with pytest.raises(DataError, match=r"no class 'cra'; did you mean car\? It has car, sign"):
        read(tmp_path, layout, classes={"cra": "the car"})
    with pytest.raises(DataError, match="cannot be asked for"):
        read(tmp_path, layout, classes={"car": "<|im_end|>"})


def test_classes_go_by_number_too(tmp_path):
    coco = read(tmp_path / "coco", "coco", classes={3: "auto", "10": None})
    assert asked_and_told(coco) == [("a.jpg", "<ref>auto</ref>", CAR[2])]
    yolo = read(tmp_path / "yolo", "yolo", classes={0: "auto", 1: None})
    assert asked_and_told(yolo) == [("a.jpg", "<ref>auto</ref>", CAR[2])]
    with pytest.raises(DataError, match="'car' is named twice"):
        read(tmp_path / "yolo", "yolo", classes={0: "auto", "car": "car"})


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "labelme"])
def test_images_without_objects(tmp_path, layout):
    skipped = read(tmp_path, layout)
    assert any("1 images without an object" in note for note in skipped.notes)
    kept = read(tmp_path, layout, unlabelled="keep")
    assert asked_and_told(kept) == [CAR, SIGN, ("b.jpg", kept[2].messages[0]["content"][1]["text"], NOTHING)]
    assert asked_and_told(kept)[2][1] in (CAR[1], SIGN[1])
    whole = read(tmp_path, layout, unlabelled="keep", rows="image", prompt="Find all.")
    assert asked_and_told(whole)[1] == ("b.jpg", "Find all.", NOTHING)


def test_what_was_left_out_makes_no_image_without_objects(tmp_path):
    """An image with a crowd alone does show something: nothing is learned of it."""
    crowd = {"id": 3, "image_id": 2, "category_id": 3, "bbox": [0, 0, 99, 99], "iscrowd": 1}
    samples = read(tmp_path, "coco", changed(COCO, "annotations", 2, crowd), unlabelled="keep")
    assert asked_and_told(samples) == [CAR, SIGN]
    assert samples.notes == [
        f"{tmp_path}/i.json: left out: 1 crowds (iscrowd: one box around many objects); "
        "1 images with nothing but what is left out"
    ]


def test_origin_pickle_and_fingerprint(tmp_path):
    samples = read(tmp_path, "coco")
    assert str(samples[1].origin) == f"{tmp_path}/i.json, row 1"
    assert str(read(tmp_path / "m", "labelme")[0].origin) == f"{tmp_path}/m/labels/a.json, row 1"
    assert str(read(tmp_path / "y", "yolo")[0].origin) == f"{tmp_path}/y/labels/a.txt, row 1"
    same, other = read(tmp_path, "coco"), read(tmp_path, "coco", classes={"car": "auto"})
    assert samples.fingerprint() == same.fingerprint() != other.fingerprint()


# --- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "named",
    [
        "C:\\Users\\me\\scans\\a.jpg",
        "/home/me/data/a.jpg",
        "https://host.example/files/a.jpg?sig=1",
        "s3://bucket/x/a.jpg",
        "file:///data/a.jpg",
        "../../a.jpg",
        "sub/a.jpg",
    ],
)
def test_images_of_other_machines_are_found_by_name(tmp_path, named):
    samples = read(tmp_path, "coco", changed(COCO, "images", 0, "file_name", named))
    assert asked_and_told(samples) == [CAR, SIGN]
    assert f"1 images found by their names alone, such as {named!r} as 'a.jpg'" in samples.notes[-1]


def test_of_several_images_of_a_name_the_folders_say_which(tmp_path):
    write_images(tmp_path, "train/a.jpg", "val/a.jpg")
    content = changed(COCO, "images", 0, "file_name", "D:\\set\\val\\a.jpg")
    path = write_export(tmp_path / "x", "coco", content)
    (tmp_path / "x" / "a.jpg").unlink()
    samples = samples_of(path, "coco", root=tmp_path)
    assert samples[0].messages[0]["content"][0]["image"] == str(tmp_path / "val" / "a.jpg")
    path.write_text(json.dumps(changed(COCO, "images", 0, "file_name", "D:\\set\\test\\a.jpg")))
    problem = problem_of(samples_of(path, "coco", root=tmp_path))
    assert "may be any of 2 files of that name: train/a.jpg, val/a.jpg" in problem.reason


def test_images_beside_the_export_come_before_those_elsewhere_in_the_root(tmp_path):
    write_images(tmp_path, "other/a.jpg")
    path = write_export(tmp_path / "x", "coco")
    beside = str(tmp_path / "x" / "a.jpg")
    assert samples_of(path, "coco", root=tmp_path)[0].messages[0]["content"][0]["image"] == beside
    path = write_export(tmp_path / "x", "label_studio")  # /data/upload/1/1a2b3c4d-a.jpg
    assert samples_of(path, "label_studio", root=tmp_path)[0].messages[0]["content"][0]["image"] == beside


def test_two_entries_for_one_image_are_refused(tmp_path):
    samples = read(tmp_path, "coco", changed(COCO, "images", 1, "file_name", "/elsewhere/a.jpg"), unlabelled="keep")
    assert asked_and_told(samples_of(tmp_path / "i.json", "coco", unlabelled="keep", limit=2)) == [CAR, SIGN]
    with pytest.raises(BadRow, match="is in the export twice, first as"):
        samples[2]


def test_boxes_are_of_the_upright_image(tmp_path):
    """A photo that is stored lying, with a mark that says so: it is 480 x 640 upright."""
    path = write_export(tmp_path, "coco")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (640, 480)).save(tmp_path / "a.jpg", exif=exif)
    assert "the boxes are of the image before its EXIF rotation" in problem_of(samples_of(path, "coco")).reason
    upright = changed(changed(COCO, "images", 0, "width", 480), "images", 0, "height", 640)
    path.write_text(json.dumps(upright))
    # 64 / 480, 48 / 640, 320 / 480 and 240 / 640 of the upright image.
    assert asked_and_told(samples_of(path, "coco"))[0] == ("a.jpg", CAR[1], "<box>(133,75),(666,375)</box>")


def test_an_image_of_another_size_is_refused(tmp_path):
    path = write_export(tmp_path, "coco")
    write_images(tmp_path, "a.jpg", size=(320, 240))
    problem = problem_of(samples_of(path, "coco"))
    assert problem.reason.startswith("was 640 x 480 pixels when it was annotated and is 320 x 240 now")
    # Fractions hold for a smaller copy, but not for a part.
    path = write_export(tmp_path, "label_studio")
    write_images(tmp_path, "a.jpg", size=(320, 240))
    assert asked_and_told(samples_of(path, "label_studio")) == [CAR, SIGN]
    write_images(tmp_path, "a.jpg", size=(320, 200))
    assert "would be in the wrong place" in problem_of(samples_of(path, "label_studio")).reason


# --- boxes that are none, or not upright ---------------------------------------------------------------------------


def test_boxes_are_cut_at_the_edge_and_counted(tmp_path):
    samples = read(tmp_path, "coco", changed(COCO, "annotations", 1, "bbox", [600, -20, 100, 68]))
    assert asked_and_told(samples)[1] == ("a.jpg", SIGN[1], "<box>(937,0),(999,100)</box>")  # 600 / 640 = 0.9375
    assert "1 boxes that reach outside the image, cut at its edge" in samples.notes[0] + samples.notes[1]


@pytest.mark.parametrize(
    ("layout", "content", "said"),
    [
        ("coco", changed(COCO, "annotations", 1, "bbox", [10, 10, -5, 5]), "annotations[1].bbox: its width is -5"),
        ("coco", changed(COCO, "annotations", 1, "bbox", [700, 10, 5, 5]), "lies outside the image of 640 x 480"),
        ("coco", changed(COCO, "annotations", 1, "bbox", [1, 2, 3, 4, 30]), "a list of 4 numbers, not 5 values"),
        ("coco", changed(COCO, "annotations", 1, "bbox", ["1", 2, 3, 4]), "must be a number, not str"),
        ("coco", changed(COCO, "annotations", 1, "category_id", 4), "4 is the id of no category"),
        ("coco", changed(COCO, "annotations", 1, "score", 0.5), "what a detector gives"),
        ("coco", changed(COCO, "images", 0, "width", 0), "must be a whole number of pixels"),
        ("labelme", changed(LABELME, "shapes", 0, "points", [[1, 2], [3, 4], [5, 6]]), "has two corners"),
        ("labelme", changed(LABELME, "shapes", 0, "points", [[1, 2], [1, 9]]), "has no area: x from 1 to 1"),
        ("labelme", changed(LABELME, "shapes", 0, "shape_type", "cube"), "'cube' is not known"),
        ("labelme", changed(LABELME, "shapes", 0, "shape_type", "rotation"), "set annotations.rotated: bounds"),
        ("cvat", CVAT.replace('ybr="240.00"', 'ybr="240.00" rotation="30"'), "turned by 30 degrees"),
        ("cvat", CVAT.replace('xtl="64.00"', 'xtl="1_0"'), "must be a number, not '1_0'"),
        ("cvat", CVAT.replace('xtl="64.00"', 'xtl="nan"'), "must be a number, not 'nan'"),
        ("cvat", CVAT.replace('xtl="64.00"', ""), "box 1.xtl: is missing"),
        ("via", changed(VIA, "a.jpg100", "regions", 0, "shape_attributes", "width", -3), "has no area"),
        ("via", changed(VIA, "a.jpg100", "regions", 0, "shape_attributes", "name", "star"), "'star' is not known"),
        ("yolo", "0 64 48 320 240\n", "line 1: 64 is no fraction of the image: are these pixels?"),
        ("yolo", "0 0.5 0.5 0.1 0.1 0.9\n", "a sixth one is the score of a detector"),
        ("yolo", "0 0.5 0.5 0 0.1\n", "its width is 0"),
        ("yolo", "\n5 0.5 0.5 0.1 0.1\n", "line 2: class 5 has no name; there are 2"),
        ("yolo", "car 0.5 0.5 0.1 0.1\n", "must begin with the number of a class"),
        ("yolo", "0000000001 0.5 0.5 0.1 0.1\n", "must begin with the number of a class"),
    ],
)
def test_a_bad_box_refuses_its_image_alone(tmp_path, layout, content, said):
    samples = read(tmp_path, layout, content)
    assert said in str(problem_of(samples))
    assert len(samples) == 1


def test_a_turned_box_of_label_studio(tmp_path):
    """60 x 80 pixels at (128, 96), turned by 90 degrees around its corner: x from 48 to 128, y from 96 to 156."""
    value = {"x": 20, "y": 20, "width": 9.375, "height": 100 / 6, "rotation": 90, "rectanglelabels": ["car"]}
    content = changed(LABEL_STUDIO, 0, "annotations", 0, "result", 0, "value", value)
    assert "turned by 90 degrees" in problem_of(read(tmp_path, "label_studio", content)).reason
    samples = read(tmp_path, "label_studio", content, rotated="bounds")
    # 48 / 640, 96 / 480, 128 / 640, 156 / 480
    assert asked_and_told(samples)[0] == ("a.jpg", CAR[1], "<box>(75,200),(200,325)</box>")
    assert "1 turned boxes, read as the upright box around them" in samples.notes[-2]


def test_around():
    assert around_turned((0, 0, 10, 20), 90, (5, 10)) == pytest.approx((-5, 5, 15, 15))
    assert around_turned((0, 0, 2, 2), 45, (1, 1)) == pytest.approx((1 - 2**0.5, 1 - 2**0.5, 1 + 2**0.5, 1 + 2**0.5))
    assert around_ellipse(10, 20, 3, 4) == pytest.approx((7, 16, 13, 24))
    assert around_ellipse(10, 20, 3, 4, 90) == pytest.approx((6, 17, 14, 23))


POLYGON = "<box>(100,100),(500,500)</box>"


@pytest.mark.parametrize(
    ("layout", "content"),
    [
        (
            "coco",
            changed(
                changed(COCO, "annotations", 0, "bbox", None), "annotations", 0, "segmentation",
                [[64, 100, 200, 48], [320, 240, 100, 60]],
            ),
        ),
        ("labelme", changed(changed(LABELME, "shapes", 0, "shape_type", "polygon"), "shapes", 0, "points",
                            [[64, 100], [200, 48], [320, 60], [100, 240]])),
        ("cvat", CVAT.replace('<box label="car" occluded="0" xtl="64.00" ytl="48.00" xbr="320.00" ybr="240.00"',
                              '<polygon label="car" points="64,100;200,48;320.0,60;100,240.00"')),
        ("cvat", CVAT.replace('<box label="car" occluded="0" xtl="64.00" ytl="48.00" xbr="320.00" ybr="240.00"',
                              '<ellipse label="car" cx="192" cy="144" rx="128" ry="96"')),
        ("via", changed(VIA, "a.jpg100", "regions", 0, "shape_attributes",
                        {"name": "polygon", "all_points_x": [64, 200, 320], "all_points_y": [100, 48, 240]})),
        ("via", changed(VIA, "a.jpg100", "regions", 0, "shape_attributes",
                        {"name": "ellipse", "cx": 192, "cy": 144, "rx": 128, "ry": 96, "theta": 0})),
        ("yolo", "0 0.1 0.3 0.2 0.1 0.5 0.5 0.3 0.4\n1 0.55 0.05 0.1 0.1\n"),
        ("label_studio", changed(LABEL_STUDIO, 0, "annotations", 0, "result", 0,
                                 {"id": "r1", "type": "polygonlabels", "original_width": 640, "original_height": 480,
                                  "value": {"points": [[10, 30], [20, 10], [50, 50]], "polygonlabels": ["car"]}})),
        ("label_studio", changed(LABEL_STUDIO, 0, "annotations", 0, "result", 0,
                                 {"id": "r1", "type": "ellipselabels", "original_width": 640, "original_height": 480,
                                  "value": {"x": 30, "y": 30, "radiusX": 20, "radiusY": 20, "rotation": 0,
                                            "ellipselabels": ["car"]}})),
    ],
)  # fmt: skip
def test_other_shapes_are_the_boxes_around_them_and_counted(tmp_path, layout, content):
    samples = read(tmp_path, layout, content)
    assert asked_and_told(samples) == [("a.jpg", CAR[1], POLYGON), SIGN]
    assert any("read as the" in note and "box around them" in note for note in samples.notes)


@pytest.mark.parametrize(
    ("layout", "content", "said"),
    [
        ("coco", changed(COCO, "annotations", 0, "keypoints", [1, 2, 2]), "1 values of keypoints"),
        ("coco", changed(COCO, "annotations", 2, {"id": 3, "image_id": 9, "category_id": 3, "bbox": [1, 1, 1, 1]}),
         "1 annotations of images that are not in the file"),
        ("coco", changed(COCO, "annotations", 2, {"id": 3, "image_id": 1, "category_id": 3,
                                                  "segmentation": {"counts": "x", "size": [480, 640]}}),
         "1 masks without a box"),
        ("coco", changed(COCO, "videos", [{"id": 1}]), "1 entries under 'videos'"),
        ("labelme", changed(LABELME, "shapes", 2, {"label": "car", "points": [[1, 2]], "shape_type": "point"}),
         "1 shapes of type point"),
        ("labelme", changed(LABELME, "flags", {"night": True}), "1 flags of the whole image"),
        ("cvat", CVAT.replace("</image>", '<points label="car" points="1,2"/><tag label="night"/></image>', 1),
         "1 shapes <points>; 1 tags of the whole image"),
        ("cvat", CVAT.replace("></box>", '><attribute name="colour">red</attribute></box>'), "1 attributes of shapes"),
        ("via", changed(VIA, "a.jpg100", "regions", 2, {"shape_attributes": {"name": "point", "cx": 1, "cy": 1},
                                                        "region_attributes": {"kind": "car"}}),
         "1 regions of shape point"),
        ("via", changed(VIA, "a.jpg100", "file_attributes", {"night": "1"}), "1 attributes of the whole image"),
        ("label_studio", changed(LABEL_STUDIO, 0, "predictions", [{"result": []}]), "1 predictions of a model"),
        ("label_studio", changed(LABEL_STUDIO, 0, "annotations", 0, "result", 2, "type", "brushlabels"),
         "1 results of type brushlabels"),
        ("label_studio", changed(LABEL_STUDIO, 1, "annotations", 0, "was_cancelled", True),
         "1 cancelled annotations; 1 images that nobody annotated"),
    ],
)  # fmt: skip
def test_what_is_no_box_is_left_out_and_counted(tmp_path, layout, content, said):
    samples = read(tmp_path, layout, content)
    assert asked_and_told(samples) == [CAR, SIGN]
    assert any(said in note for note in samples.notes), samples.notes


def test_yolo_labels_without_images_and_keypoints(tmp_path):
    path = write_export(tmp_path, "yolo", "0 0.3 0.3 0.4 0.4 0.1 0.2 2 0.1 0.3 2\n1 0.55 0.05 0.1 0.1 0 0 0 0 0 0\n")
    (tmp_path / "data.yaml").write_text(YOLO_NAMES + "kpt_shape: [2, 3]\n")
    (tmp_path / "labels" / "gone.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    samples = samples_of(path, "yolo")
    assert asked_and_told(samples) == [CAR, SIGN]
    assert "1 label files without an image; 2 lists of keypoints" in samples.notes[0]


# --- the files -----------------------------------------------------------------------------------------------------


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
