"""Annotation exports: the boxes of each layout against values worked out by hand, and what is refused or left out."""

import json

import pytest
from exports_for_tests import (
    CAR,
    COCO,
    CVAT,
    LABEL_STUDIO,
    LABELME,
    NOTHING,
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
from PIL import Image

from finetune.data.sample import BadRow, DataError
from finetune.data.sources.exports.labelled import around_ellipse, around_turned
from finetune.recipe.sources import LAYOUTS


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
