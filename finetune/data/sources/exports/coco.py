"""Layout `coco`: one JSON file of images, annotations and categories, as the instances and captions of COCO.

Boxes are x, y, width, height in pixels. Where there is a polygon and no box, the box is the one around the polygon. A
crowd (`iscrowd`: one box around many) is left out, and so is a mask without a box.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from finetune.data.formats.fields import text
from finetune.data.sample import BadField, DataError, Origin
from finetune.data.sources.exports.json_file import missing, read_json
from finetune.data.sources.exports.labelled import (
    Export,
    LabelledImage,
    around,
    items,
    number,
    numbers,
    size_of,
)

# Of an annotation: read, or harmless.
_KNOWN = {"id", "image_id", "category_id", "bbox", "iscrowd", "caption", "segmentation", "area", "ignore", "bbox_mode"}
_FILE = {"images", "annotations", "categories", "info", "licenses", "type"}
_HAS_BOX = "there is a box"


def read_coco(path: Path, name: str, wanted: Literal["grounding", "caption"]) -> Export:
    """Read a file of boxes or of captions.

    Args:
        path, name: the file, and what messages call it.
        wanted: objects, or captions.

    Raises:
        DataError: not JSON, not of this layout, or without anything that is wanted.
    """
    document = read_json(path, name, _without_polygons)
    if isinstance(document, list):
        raise DataError(
            f"{name}: holds a list, and a COCO file is an object with images, annotations and categories: a list of "
            "image_id, bbox and score is what a detector found"
        )
    if not isinstance(document, dict):
        raise DataError(f"{name}: must hold an object with images, annotations and categories")
    for key in ("images", "annotations"):
        if not isinstance(document.get(key), list):
            raise missing(name, key, document)
    export = Export()
    for key, value in document.items():
        if key not in _FILE and value:
            export.left_out[f"entries under {key!r}"] += len(value) if isinstance(value, list | dict) else 1
    if wanted == "grounding":
        export.classes = _categories(document.get("categories"), name)
    images = _images(document["images"], name, export)
    orphans = 0
    found = False
    for index, given in enumerate(document["annotations"]):
        if not isinstance(given, dict) or not isinstance(given.get("image_id"), int | str):
            raise DataError(f"{name}: annotations[{index}] must be an object with an image_id")
        image = images.get(_id(given["image_id"]))
        if image is None:
            orphans += 1
            continue
        try:
            place = f"annotations[{index}]"
            taken = _caption(given, place, image, export) if wanted == "caption" else _box(given, place, image, export)
        except BadField as error:
            taken = True
            image.refuse(error)
        found = found or taken
    if orphans:
        if orphans == len(document["annotations"]):
            raise DataError(f"{name}: the image_id of no annotation is the id of an image: are they of another file?")
        export.left_out["annotations of images that are not in the file"] = orphans
    if document["annotations"] and not found:
        what, other = ("captions", "grounding") if wanted == "caption" else ("boxes", "caption")
        raise DataError(f"{name}: there are no {what} in its annotations; for the rest of it there is format {other}")
    return export


def _without_polygons(item: dict[str, Any]) -> dict[str, Any]:
    # A file of instances is mostly polygons: they are not kept where there is a box.
    if "segmentation" in item and isinstance(item.get("bbox"), list):
        item["segmentation"] = _HAS_BOX
    return item


def _id(value: Any) -> Any:
    """The id, which must be a whole number or text: 1, "1" and 1.0 are told apart, true is no 1."""
    return (type(value).__name__, value)


def _images(given: list[Any], name: str, export: Export) -> dict[Any, LabelledImage]:
    images: dict[Any, LabelledImage] = {}
    for index, item in enumerate(given):
        place = f"images[{index}]"
        if not isinstance(item, dict) or isinstance(item.get("id"), bool) or not isinstance(item.get("id"), int | str):
            raise DataError(f"{name}: {place} must be an object with an id")
        if not isinstance(item.get("file_name"), str) or not item["file_name"].strip():
            raise DataError(f"{name}: {place} has no file_name")
        image = LabelledImage(item["file_name"], Origin(name, index + 1))
        if _id(item["id"]) in images:
            raise DataError(f"{name}: {place}: two images have the id {item['id']!r}")
        try:
            image.size = size_of(item, "width", "height")
        except BadField as error:
            image.refuse(BadField(f"{place}.{error.field}", error.reason))
        images[_id(item["id"])] = image
        export.images.append(image)
    return images


def _categories(given: Any, name: str) -> dict[str, str]:
    if not isinstance(given, list):
        raise missing(name, "categories", {} if given is None else [type(given).__name__], ": boxes have no classes")
    classes: dict[str, str] = {}
    for index, item in enumerate(given):
        if not isinstance(item, dict) or isinstance(item.get("id"), bool) or not isinstance(item.get("id"), int):
            raise DataError(f"{name}: categories[{index}] must be an object with an id, a whole number")
        if not isinstance(item.get("name"), str) or not item["name"].strip():
            raise DataError(f"{name}: categories[{index}] has no name")
        if str(item["id"]) in classes:
            raise DataError(f"{name}: categories[{index}]: two categories have the id {item['id']}")
        classes[str(item["id"])] = item["name"]
    return classes


def _caption(given: Mapping[str, Any], place: str, image: LabelledImage, export: Export) -> bool:
    if "caption" not in given:
        export.left_out["annotations without a caption"] += 1
        return False
    image.captions.append(text(given["caption"], f"{place}.caption"))
    return True


def _box(given: Mapping[str, Any], place: str, image: LabelledImage, export: Export) -> bool:
    """Add the annotation's object; whether it has one."""
    polygon = given.get("segmentation")
    if given.get("bbox") is None and not polygon:
        export.left_out["captions" if "caption" in given else "annotations without a box"] += 1
        image.complete = image.complete and "caption" in given
        return False
    if "score" in given:
        raise BadField(f"{place}.score", "is what a detector gives, and this is no annotation")
    for key in given.keys() - _KNOWN:
        export.left_out[f"values of {key}"] += 1
    if number(given.get("iscrowd") or 0, f"{place}.iscrowd"):
        export.left_out["crowds (iscrowd: one box around many objects)"] += 1
        image.complete = False
        return True
    label = given.get("category_id")
    if isinstance(label, bool) or not isinstance(label, int) or str(label) not in export.classes:
        raise BadField(f"{place}.category_id", f"{label!r} is the id of no category"[:200])
    if given.get("bbox") is not None:
        x, y, width, height = numbers(given["bbox"], f"{place}.bbox", 4)
        if width <= 0 or height <= 0:
            raise BadField(f"{place}.bbox", f"its width is {width:g} and its height {height:g}")
        if given.get("bbox_mode", 1) not in (1, "XYWH_ABS"):
            raise BadField(f"{place}.bbox_mode", f"must be 1 (x, y, width, height), not {given['bbox_mode']!r}"[:200])
        box = (x, y, x + width, y + height)
    elif isinstance(polygon, dict):
        export.left_out["masks without a box"] += 1
        image.complete = False
        return True
    else:
        xs: list[float] = []
        ys: list[float] = []
        for part, points in enumerate(items(polygon, f"{place}.segmentation")):
            flat = numbers(points, f"{place}.segmentation[{part}]")
            xs += flat[0::2]
            ys += flat[1::2]
        box = around(xs, ys, f"{place}.segmentation")
        export.changed["polygons without a box, read as the box around them"] += 1
    export.add_object(image, str(label), box, f"{place}.bbox", numbered=True)
    return True
