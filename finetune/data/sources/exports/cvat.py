"""Layout `cvat`: CVAT for images 1.1, one XML file.

    <annotations><image id="0" name="a.jpg" width="640" height="480">
      <box label="car" xtl="64" ytl="48" xbr="320" ybr="240"/></image></annotations>

Boxes are in pixels; polygons, ellipses and masks are the boxes around them. Points, polylines, cuboids and skeletons
are left out. Tracks (CVAT for video) are refused.
"""

from pathlib import Path
from typing import Literal
from xml.etree.ElementTree import Element

from finetune.data.formats.fields import text
from finetune.data.sample import BadField, DataError, Origin
from finetune.data.sources.exports.labelled import (
    TURNED,
    Box,
    Export,
    LabelledImage,
    around,
    around_ellipse,
    around_turned,
    refuse_turned,
    size_of,
    turned,
    written_number,
)
from finetune.data.sources.exports.xml_file import read_xml

_LEFT_OUT = ("points", "polyline", "cuboid", "skeleton")


def read_cvat(path: Path, name: str, rotated: Literal["error", "bounds"]) -> Export:
    """Read the shapes of all images.

    Args:
        path, name: the file, and what messages call it.
        rotated: what to make of turned boxes.

    Raises:
        DataError: not XML, not of this layout, or of videos.
    """
    export = Export()
    for element in read_xml(path, name, "annotations"):
        match element.tag:
            case "version":
                continue
            case "meta":
                for found in element.iterfind("./*/labels/label/name"):
                    if found.text and found.text.strip():
                        export.classes[found.text] = found.text
            case "track":
                raise DataError(f"{name}: holds tracks of a video: export it as `CVAT for images 1.1`")
            case "image":
                export.images.append(_image(element, Origin(name, len(export.images) + 1), export, rotated))
            case other:
                export.left_out[f"elements <{other[:40]}>"] += 1
    if not export.images:
        raise DataError(f"{name}: holds no <image>: export it as `CVAT for images 1.1`")
    return export


def _image(element: Element, origin: Origin, export: Export, rotated: Literal["error", "bounds"]) -> LabelledImage:
    image = LabelledImage(element.get("name", ""), origin)
    try:
        text(image.name, "name")
        sides = {key: _number(element, key, "image") for key in ("width", "height") if element.get(key) is not None}
        image.size = size_of(sides, "width", "height")
        for index, shape in enumerate(element):
            _read_shape(shape, f"{shape.tag[:40]} {index + 1}", image, export, rotated)
    except BadField as error:
        image.refuse(error)
    return image


def _read_shape(
    shape: Element, place: str, image: LabelledImage, export: Export, rotated: Literal["error", "bounds"]
) -> None:
    if shape.tag == "tag":
        export.left_out["tags of the whole image"] += 1
        return
    if shape.tag in _LEFT_OUT:
        export.left_out[f"shapes <{shape.tag}>"] += 1
        image.complete = False
        return
    label = text(shape.get("label"), f"{place}.label")
    if values := sum(inner.tag == "attribute" for inner in shape):
        export.left_out["attributes of shapes"] += values
    export.add_object(image, label, _box(shape, place, export, rotated), place)


def _box(shape: Element, place: str, export: Export, rotated: Literal["error", "bounds"]) -> Box:
    def value(key: str) -> float:
        return _number(shape, key, place)

    degrees = value("rotation") if shape.get("rotation") else 0.0
    if shape.tag == "box":
        box = (value("xtl"), value("ytl"), value("xbr"), value("ybr"))
        if not turned(degrees):
            return box
        if rotated == "error":
            raise refuse_turned(f"{place}.rotation", f"a box turned by {degrees:g} degrees")
        export.changed[TURNED] += 1
        return around_turned(box, degrees, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
    if shape.tag not in ("polygon", "ellipse", "mask"):
        raise BadField(place, "is a shape that is not known")
    export.changed[f"{shape.tag}s, read as the box around them"] += 1
    if shape.tag == "ellipse":
        return around_ellipse(value("cx"), value("cy"), value("rx"), value("ry"), degrees)
    if shape.tag == "mask":
        return value("left"), value("top"), value("left") + value("width"), value("top") + value("height")
    pairs = [pair.split(",") for pair in text(shape.get("points"), f"{place}.points").split(";")]
    if any(len(pair) != 2 for pair in pairs):
        raise BadField(f"{place}.points", "must be x,y;x,y;...")
    points = [(written_number(x, f"{place}.points"), written_number(y, f"{place}.points")) for x, y in pairs]
    return around([x for x, _ in points], [y for _, y in points], f"{place}.points")


def _number(element: Element, key: str, place: str) -> float:
    given = element.get(key)
    if given is None:
        raise BadField(f"{place}.{key}", "is missing")
    return written_number(given, f"{place}.{key}")
