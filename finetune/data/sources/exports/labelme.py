"""Layout `labelme`: a folder with a JSON file for each image, as LabelMe writes them.

Rectangles are boxes; polygons, circles and masks are the boxes around them. Points and lines are left out: they have
no area.
"""

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from finetune.data.formats.fields import text
from finetune.data.sample import BadField, DataError, Origin
from finetune.data.sources.exports.json_file import read_json
from finetune.data.sources.exports.labelled import (
    TURNED,
    Box,
    Export,
    LabelledImage,
    around,
    around_ellipse,
    items,
    mapping,
    numbers,
    refuse_turned,
    size_of,
)

_AROUND = ("polygon", "mask")
_TURNED = ("rotation", "oriented_rectangle", "rotated_rectangle")
_NO_AREA = ("point", "points", "line", "linestrip")


def read_labelme(folder: Path, name: str, rotated: Literal["error", "bounds"]) -> Export:
    """Read all JSON files of a folder and of those inside it, in the order of their paths.

    Args:
        folder, name: the folder, and what messages call it.
        rotated: what to make of turned rectangles.

    Raises:
        DataError: no folder, none of these files in it, or one that is not JSON.
    """
    if not folder.is_dir():
        raise DataError(f"{name}: layout labelme is a folder with a JSON file for each image; give the folder")
    export = Export()
    for file in sorted(folder.rglob("*.json")):
        inside = file.relative_to(folder).as_posix()
        document = read_json(file, f"{name}/{inside}", _without_pixels)
        if not isinstance(document, dict) or not isinstance(document.get("shapes"), list):
            export.left_out["JSON files that are not LabelMe's (they have no shapes)"] += 1
            continue
        image = LabelledImage("", Origin(f"{name}/{inside}", 1), folder=str(PurePosixPath(inside).parent))
        export.images.append(image)
        try:
            # LabelMe for Windows writes its separators.
            image.name = text(document.get("imagePath"), "imagePath").replace("\\", "/")
            image.size = size_of(document, "imageWidth", "imageHeight")
            if any(value not in (False, None) for value in mapping(document.get("flags") or {}, "flags").values()):
                export.left_out["flags of the whole image"] += 1
            for index, shape in enumerate(document["shapes"]):
                _read_shape(mapping(shape, f"shapes[{index}]"), f"shapes[{index}]", image, export, rotated)
        except BadField as error:
            image.refuse(error)
    if not export.images:
        raise DataError(f"{name}: there is no JSON file of LabelMe in the folder")
    return export


def _without_pixels(item: dict[str, Any]) -> dict[str, Any]:
    # The image itself, and masks, in base64.
    for key in ("imageData", "mask"):
        if isinstance(item.get(key), str):
            item[key] = None
    return item


def _read_shape(
    shape: Mapping[str, Any], place: str, image: LabelledImage, export: Export, rotated: Literal["error", "bounds"]
) -> None:
    label = text(shape.get("label"), f"{place}.label")
    kind = shape.get("shape_type") or "polygon"
    points = [numbers(point, f"{place}.points", 2) for point in items(shape.get("points"), f"{place}.points")]
    for key in ("description", "attributes"):
        if shape.get(key):
            export.left_out[f"values of {key}"] += 1
    if any(mapping(shape.get("flags") or {}, f"{place}.flags").values()):
        export.left_out["flags of shapes"] += 1
    if kind in _NO_AREA:
        export.left_out[f"shapes of type {kind}"] += 1
        image.complete = False
        return
    xs, ys = [x for x, _ in points], [y for _, y in points]
    box: Box
    if kind == "rectangle" or kind in _AROUND or kind in _TURNED:
        # LabelMe's are two corners; X-AnyLabeling writes four.
        if kind == "rectangle" and not (len(points) == 2 or (len(points) == 4 and _upright(xs, ys))):
            raise BadField(f"{place}.points", f"a rectangle has two corners, or four upright ones, not {len(points)}")
        if kind in _TURNED and rotated == "error":
            raise refuse_turned(place, f"a {kind}")
        if kind in _TURNED:
            export.changed[TURNED] += 1
        elif kind != "rectangle":
            export.changed[f"{kind}s, read as the box around them"] += 1
        box = around(xs, ys, f"{place}.points")
    elif kind == "circle":
        if len(points) != 2:
            raise BadField(f"{place}.points", f"a circle has its centre and a point of its edge, not {len(points)}")
        radius = math.dist(points[0], points[1])
        export.changed["circles, read as the box around them"] += 1
        box = around_ellipse(points[0][0], points[0][1], radius, radius)
    else:
        raise BadField(f"{place}.shape_type", f"{kind!r} is not known"[:200])
    export.add_object(image, label, box, f"{place}.points")


def _upright(xs: list[float], ys: list[float]) -> bool:
    """Whether four points are the corners of an upright rectangle."""
    return {(x, y) for x in xs for y in ys} == set(zip(xs, ys, strict=True)) and len(set(xs)) == len(set(ys)) == 2
