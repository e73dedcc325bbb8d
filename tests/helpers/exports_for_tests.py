"""Annotation exports for tests: one small export of each layout, all of the same two objects, and readers of them."""

import copy
import json
from pathlib import Path

import pytest
from PIL import Image

from finetune.data.sample import BadRow
from finetune.data.samples import Samples
from finetune.recipe.sources import Source

CAR = [64, 48, 320, 240]
"""Corners in pixels of 640 x 480: (100,100),(500,500) in thousandths."""
SIGN = [320, 0, 384, 48]
"""(500,0),(600,100) in thousandths."""

COCO = {
    "info": {},
    "images": [
        {"id": 1, "file_name": "a.jpg", "width": 640, "height": 480},
        {"id": 2, "file_name": "b.jpg", "width": 640, "height": 480},
    ],
    "categories": [{"id": 3, "name": "car"}, {"id": 10, "name": "sign"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [64, 48, 256, 192], "iscrowd": 0, "area": 1.5},
        {"id": 2, "image_id": 1, "category_id": 10, "bbox": [320, 0, 64, 48], "iscrowd": 0},
    ],
}
LABEL_STUDIO = [
    {
        "id": 7,
        "data": {"image": "/data/upload/1/1a2b3c4d-a.jpg", "what": "the total"},
        "annotations": [
            {
                "was_cancelled": False,
                "result": [
                    {
                        "id": "r1", "type": "rectanglelabels", "from_name": "l", "to_name": "image",
                        "original_width": 640, "original_height": 480, "image_rotation": 0,
                        "value": {"x": 10, "y": 10, "width": 40, "height": 40, "rectanglelabels": ["car"]},
                    },
                    {
                        "id": "r2", "type": "rectanglelabels", "from_name": "l", "to_name": "image",
                        "original_width": 640, "original_height": 480, "image_rotation": 0,
                        "value": {"x": 50, "y": 0, "width": 10, "height": 10, "rectanglelabels": ["sign"]},
                    },
                    {"id": "t", "type": "textarea", "from_name": "text", "value": {"text": ["$ 12.40"]}},
                    {"id": "c", "type": "choices", "from_name": "paid", "value": {"choices": ["Y"]}},
                ],
            }
        ],
        "predictions": [],
    },
    {"id": 8, "data": {"image": "b.jpg", "what": "it"}, "annotations": [{"was_cancelled": False, "result": []}]},
]  # fmt: skip
QUESTIONS = {"text": "What is {what}?", "paid": "Is it paid?"}
LABELME = {
    "version": "5.4.1",
    "flags": {},
    "imagePath": "..\\a.jpg",
    "imageData": "AAAA",
    "imageHeight": 480,
    "imageWidth": 640,
    "shapes": [
        {"label": "car", "points": [[320, 240], [64, 48]], "shape_type": "rectangle", "flags": {}, "group_id": None},
        {"label": "sign", "points": [[320, 0], [384, 48]], "shape_type": "rectangle", "flags": {}, "group_id": None},
    ],
}
CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version>
<meta><job><labels><label><name>car</name></label><label><name>sign</name></label></labels></job></meta>
<image id="0" name="a.jpg" width="640" height="480">
<box label="car" occluded="0" xtl="64.00" ytl="48.00" xbr="320.00" ybr="240.00" z_order="0"/>
<box label="sign" occluded="0" xtl="320" ytl="0" xbr="384" ybr="48" z_order="0"></box>
</image>
<image id="1" name="b.jpg" width="640" height="480"/>
</annotations>
"""
VIA = {
    "a.jpg100": {
        "filename": "a.jpg",
        "size": 100,
        "file_attributes": {},
        "regions": [
            {
                "shape_attributes": {"name": "rect", "x": 64, "y": 48, "width": 256, "height": 192},
                "region_attributes": {"kind": "car"},
            },
            {
                "shape_attributes": {"name": "rect", "x": 320, "y": 0, "width": 64, "height": 48},
                "region_attributes": {"kind": "sign"},
            },
        ],
    },
    "b.jpg100": {"filename": "b.jpg", "size": 100, "file_attributes": {}, "regions": []},
}
YOLO = "0 0.3 0.3 0.4 0.4\n1 0.55 0.05 0.1 0.1\n"
YOLO_NAMES = "path: /content/datasets/x\ntrain: ../images\nnc: 2\nnames: [car, sign]\n"

FILES = {
    "coco": "i.json",
    "label_studio": "t.json",
    "labelme": "labels",
    "cvat": "a.xml",
    "via": "v.json",
    "yolo": ".",
}


def write_images(folder: Path, *names: str, size: tuple[int, int] = (640, 480)) -> None:
    for name in names or ("a.jpg", "b.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "teal").save(folder / name)


def write_export(folder: Path, layout: str, content=None) -> Path:
    """The export of a layout, or another content of its main file, and its images; gives the path of the source."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "yolo":
        write_images(folder, "images/a.jpg", "images/b.jpg")
        (folder / "labels").mkdir(exist_ok=True)
        (folder / "labels" / "a.txt").write_text(YOLO if content is None else content)
        (folder / "data.yaml").write_text(YOLO_NAMES)
        return folder
    write_images(folder)
    path = folder / FILES[layout]
    if layout == "labelme":
        path.mkdir(exist_ok=True)
        file = path / "a.json"
    else:
        file = path
    if content is None:
        content = {"coco": COCO, "label_studio": LABEL_STUDIO, "labelme": LABELME, "cvat": CVAT, "via": VIA}[layout]
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def samples_of(path: Path, layout: str, *, format: str = "grounding", root: Path | None = None, **given) -> Samples:
    """The samples of an export; `given` are keys of `annotations`, and `prompt` and `split` of the source."""
    own = {key: given.pop(key) for key in ("prompt", "split", "limit") if key in given}
    annotations = {"layout": layout, **given}
    source = Source(path=str(path), format=format, annotations=annotations, **own)
    # LabelMe's are beside the folder of its JSON files.
    root = root or (path.parent if layout == "labelme" else None)
    return Samples([source], images_root=root)


def asked_and_told(samples: Samples) -> list[tuple[str, str, str]]:
    """(name of the image, question, reply) of each sample."""
    found = []
    for sample in samples:
        user, assistant = sample.messages
        image, text = user["content"]
        found.append((Path(image["image"]).name, text["text"], assistant["content"]))
    return found


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


def read_export(folder, layout, content=None, **given):
    return samples_of(write_export(folder, layout, content), layout, **given)


def problem_of(samples) -> BadRow:
    """The problem of the first sample."""
    with pytest.raises(BadRow) as caught:
        samples[0]
    return caught.value
