"""Layout `via`: a project of the VGG Image Annotator 2, or its annotations as JSON (also of version 1).

    {"_via_img_metadata": {"a.jpg1234": {"filename": "a.jpg", "size": 1234, "regions": [
        {"shape_attributes": {"name": "rect", "x": 64, "y": 48, "width": 256, "height": 192},
         "region_attributes": {"label": "car"}}]}}}

Rectangles are boxes; circles, ellipses and polygons are the boxes around them. Points and lines are left out.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.data.formats.fields import text
from finetune.data.sample import BadField, DataError, Origin
from finetune.data.sources.exports.json_file import read_json
from finetune.data.sources.exports.labelled import (
    Box,
    Export,
    LabelledImage,
    around,
    around_ellipse,
    items,
    mapping,
    number,
    numbers,
)

_NO_AREA = ("point", "polyline", "line")
_PROJECT = "_via_img_metadata"


def read_via(path: Path, name: str, label: str | None) -> Export:
    """Read the regions of all images.

    Args:
        path, name: the file, and what messages call it.
        label: the region attribute that holds the class; None where there is only one.

    Raises:
        DataError: not JSON, not of this layout, or several attributes and no `label`.
    """
    document = read_json(path, name)
    if isinstance(document, dict) and isinstance(document.get("metadata"), dict) and "config" in document:
        raise DataError(f"{name}: is of VIA 3, and version 2 is read: export it as COCO (layout: coco)")
    images = document.get(_PROJECT, document) if isinstance(document, dict) else None
    if not isinstance(images, dict) or not all(
        isinstance(item, dict) and "filename" in item and "regions" in item for item in images.values()
    ):
        raise DataError(f"{name}: holds neither a project of VIA 2 ({_PROJECT}) nor its annotations as JSON")
    regions = {key: _regions(item["regions"]) for key, item in images.items()}
    attribute = _attribute(regions, name, label)
    export = Export()
    for index, (key, item) in enumerate(images.items()):
        image = LabelledImage("", Origin(name, index + 1))
        export.images.append(image)
        try:
            image.name = text(item["filename"], f"{key}.filename")
            if any(value not in ("", {}, None) for value in mapping(item.get("file_attributes") or {}, key).values()):
                export.left_out["attributes of the whole image"] += 1
            found = regions[key]
            if isinstance(found, BadField):
                raise found
            for number_of, region in enumerate(found):
                _read_region(
                    mapping(region, f"regions[{number_of}]"), f"regions[{number_of}]", image, export, attribute
                )
        except BadField as error:
            image.refuse(error)
    return export


def _regions(given: Any) -> list[Any] | BadField:
    """The regions of an image: a list, or in version 1 an object; or why they cannot be read."""
    try:
        return list(given.values()) if isinstance(given, dict) else items(given, "regions")
    except BadField as error:
        return error


def _attribute(regions: Mapping[str, list[Any] | BadField], name: str, label: str | None) -> str:
    """The region attribute that holds the class."""
    names: dict[str, None] = {}
    for found in regions.values():
        for region in found if isinstance(found, list) else ():
            given = region.get("region_attributes") if isinstance(region, dict) else None
            names.update(dict.fromkeys(given if isinstance(given, dict) else ()))
    if label is not None:
        if names and label not in names:
            raise DataError(f"{name}: annotations.label: no region has {label!r} but {', '.join(names)}"[:500])
        return label
    if len(names) > 1:
        raise DataError(
            f"{name}: its regions have several attributes, {', '.join(names)}: say which one is the class with "
            "annotations.label"[:700]
        )
    return next(iter(names), "")


def _read_region(region: Mapping[str, Any], place: str, image: LabelledImage, export: Export, attribute: str) -> None:
    shape = mapping(region.get("shape_attributes"), f"{place}.shape_attributes")
    attributes = mapping(region.get("region_attributes"), f"{place}.region_attributes")
    for key, value in attributes.items():
        if key != attribute and value not in ("", {}, None):
            export.left_out[f"values of {key}"] += 1
    kind = text(shape.get("name"), f"{place}.shape_attributes.name")
    if kind in _NO_AREA:
        export.left_out[f"regions of shape {kind}"] += 1
        image.complete = False
        return
    box = _box(shape, kind, f"{place}.shape_attributes", export)
    given = attributes.get(attribute)
    if isinstance(given, dict):  # a checkbox: option -> whether it is set
        labels = [option for option, is_set in given.items() if is_set]
    else:
        labels = [] if given in ("", None) else [text(given, f"{place}.region_attributes.{attribute}")]
    if not labels:
        export.left_out["regions without a label"] += 1
        image.complete = False
    for label in labels:
        export.add_object(image, label, box, f"{place}.shape_attributes")


def _box(shape: Mapping[str, Any], kind: str, place: str, export: Export) -> Box:
    def value(key: str) -> float:
        return number(shape.get(key), f"{place}.{key}")

    if kind == "rect":
        return value("x"), value("y"), value("x") + value("width"), value("y") + value("height")
    if kind not in ("circle", "ellipse", "polygon"):
        raise BadField(f"{place}.name", f"{kind!r} is not known"[:200])
    export.changed[f"{kind}s, read as the box around them"] += 1
    if kind == "polygon":
        xs = numbers(shape.get("all_points_x"), f"{place}.all_points_x")
        ys = numbers(shape.get("all_points_y"), f"{place}.all_points_y")
        return around(xs, ys, place)
    if kind == "circle":
        return around_ellipse(value("cx"), value("cy"), value("r"), value("r"))
    degrees = math.degrees(number(shape.get("theta") or 0, f"{place}.theta"))
    return around_ellipse(value("cx"), value("cy"), value("rx"), value("ry"), degrees)
