"""Layout `label_studio`: Label Studio's JSON export, a list of tasks.

Of a task, the accepted annotation is read (`ground_truth`), else the first that was not cancelled. Regions are
percentages of the upright image. Rectangles are boxes, polygons and ellipses the boxes around them; a text area or
choice that is about the whole image answers a question.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from finetune.data.formats.fields import text
from finetune.data.sample import BadField, DataError, Origin
from finetune.data.sources.exports.json_file import read_json
from finetune.data.sources.exports.labelled import (
    TURNED,
    Answer,
    Box,
    Export,
    LabelledImage,
    around,
    around_ellipse,
    around_turned,
    items,
    mapping,
    number,
    numbers,
    refuse_turned,
    size_of,
    turned,
)

_LABELS = ("rectanglelabels", "labels", "polygonlabels", "ellipselabels")
_SHAPES = (*_LABELS, "rectangle", "polygon", "ellipse")
_ANSWERS = ("textarea", "choices")
_IMAGE_KEYS = ("image", "img", "ocr")
_IMAGE_NAME = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)
_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(slots=True)
class _Region:
    """The results of one id: its shape, and the labels that may be in another result than the shape."""

    name: str
    labels: list[str] = field(default_factory=list)
    box: Box | None = None


def read_label_studio(
    path: Path,
    name: str,
    questions: Mapping[str, str | None] | None,
    rotated: Literal["error", "bounds"],
) -> Export:
    """Read the tasks' regions, or their answers.

    Args:
        path, name: the file, and what messages call it.
        questions: name of a control (`from_name`) -> the question that it answers, with {key} for what the task's
            `data` has under a key; None leaves the control out. None instead of them reads the objects.
        rotated: what to make of turned rectangles.

    Raises:
        DataError: not JSON, not of this layout, or a control that answers a question that nobody named.
    """
    document = read_json(path, name)
    if not isinstance(document, list):
        raise DataError(f"{name}: must hold a list of tasks; export as JSON from Label Studio")
    export = Export()
    unknown: dict[str, None] = {}
    used: set[str] = set()
    for index, task in enumerate(document):
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            minimal = isinstance(task, dict) and "annotator" in task
            raise DataError(
                f"{name}: [{index}] has no `data`: "
                + ("this is JSON-MIN; export as JSON" if minimal else "it is no task as Label Studio exports it")
            )
        image = LabelledImage("", Origin(name, index + 1), unit="fractions")
        export.images.append(image)
        try:
            image.name = _image_name(task["data"])
            results = _results(task, image, export)
            if questions is None:
                _read_regions(results, image, export, rotated)
            else:
                _read_answers(results, task["data"], image, export, questions, unknown, used)
        except BadField as error:
            image.refuse(BadField(f"[{index}].{error.field}", error.reason))
    if unknown:
        listed = ", ".join(unknown)
        raise DataError(
            f"{name}: nothing says which question {listed} answers: name one under annotations.questions, such as "
            f"questions: {{{next(iter(unknown))}: What is the total?}}, or null to leave it out"
        )
    if stray := [control for control in questions or () if control not in used]:
        raise DataError(f"{name}: annotations.questions: there is no text area or choice named {', '.join(stray)}")
    return export


def _image_name(data: Mapping[str, Any]) -> str:
    named = [key for key in _IMAGE_KEYS if isinstance(data.get(key), str)]
    named = named or [
        key for key, value in data.items() if isinstance(value, str) and _IMAGE_NAME.search(_path_in(value))
    ]
    if len(named) > 1:
        raise BadField("data", f"several of it are images: {', '.join(named)}")
    if not named:
        raise BadField("data", f"none of {', '.join(data) or 'nothing'} is an image"[:300])
    return _path_in(text(data[named[0]], f"data.{named[0]}"))


def _path_in(source: str) -> str:
    """The path that a link to local storage names, `/data/local-files/?d=scans/1.png`; others as they are."""
    if "/local-files/" not in source:
        return source
    try:
        named = parse_qs(urlsplit(source).query).get("d", [source])
    except ValueError:
        return source
    return named[0]


def _results(task: Mapping[str, Any], image: LabelledImage, export: Export) -> list[Any]:
    """The results of the annotation that is read; `image.annotated` says whether there is one."""
    if task.get("predictions"):
        export.left_out["predictions of a model"] += len(items(task["predictions"], "predictions"))
    if "completions" in task:
        raise BadField("completions", "is how Label Studio exported before version 1.0: export again")
    given = [mapping(one, f"annotations[{i}]") for i, one in enumerate(items(task.get("annotations"), "annotations"))]
    done = [one for one in given if not one.get("was_cancelled")]
    if len(done) < len(given):
        export.left_out["cancelled annotations"] += len(given) - len(done)
    if not done:
        image.annotated = False
        return []
    if len(done) > 1:
        export.left_out["further annotations of a task, of which the accepted one is read or the first"] += (
            len(done) - 1
        )
    chosen = next((one for one in done if one.get("ground_truth")), done[0])
    return items(chosen.get("result"), "annotations.result")


def _read_regions(
    results: list[Any], image: LabelledImage, export: Export, rotated: Literal["error", "bounds"]
) -> None:
    regions: dict[str, _Region] = {}
    for index, given in enumerate(results):
        place = f"result[{index}]"
        kind = text(mapping(given, place).get("type"), f"{place}.type")
        if kind not in _SHAPES:
            export.left_out[f"results of type {kind[:40]}"] += 1
            # These show something in the image, and no box says where.
            image.complete = image.complete and not kind.startswith(("brush", "bitmask", "keypoint", "vector"))
            continue
        value = mapping(given.get("value"), f"{place}.value")
        if "x" not in value and "points" not in value:
            export.left_out["labels of the whole image"] += 1
            continue
        if given.get("item_index"):
            raise BadField(f"{place}.item_index", "is of a task with several images, which is not read")
        if turned(number(given.get("image_rotation") or 0, f"{place}.image_rotation")):
            raise BadField(
                f"{place}.image_rotation", "the image was turned in the editor: turn the file, and its boxes"
            )
        size = size_of(given, "original_width", "original_height")
        if image.size is not None and size is not None and size != image.size:
            raise BadField(f"{place}.original_width", f"the image has {size}, and before it had {image.size} pixels")
        image.size = size or image.size
        region = regions.setdefault(str(given.get("id", place)), _Region(place))
        region.box = _box(value, kind, f"{place}.value", image, export, rotated, again=region.box is not None)
        for key in _LABELS:
            if key in value:
                labels = items(value[key], f"{place}.value.{key}")
                region.labels += [text(label, f"{place}.value.{key}") for label in labels]
    for region in regions.values():
        if not region.labels:
            export.left_out["regions without a label"] += 1
            image.complete = False
        for label in dict.fromkeys(region.labels):
            assert region.box is not None, "every result of a region has a shape"
            export.add_object(image, label, region.box, region.name)


def _box(
    value: Mapping[str, Any],
    kind: str,
    name: str,
    image: LabelledImage,
    export: Export,
    rotated: Literal["error", "bounds"],
    *,
    again: bool,
) -> Box:
    """The upright box of a region in fractions; `again`: its shape was counted with another result of the region."""
    if "points" in value:
        points = [numbers(point, f"{name}.points", 2) for point in items(value["points"], f"{name}.points")]
        if not again:
            export.changed["polygons, read as the box around them"] += 1
        x1, y1, x2, y2 = around([x for x, _ in points], [y for _, y in points], f"{name}.points")
        return x1 / 100, y1 / 100, x2 / 100, y2 / 100
    x, y = number(value.get("x"), f"{name}.x") / 100, number(value.get("y"), f"{name}.y") / 100
    degrees = number(value.get("rotation") or 0, f"{name}.rotation")
    if turned(degrees) and image.size is None:
        raise BadField(f"{name}.rotation", "cannot be read without original_width and original_height")
    # Turned in pixels: a percentage of the width is another length than one of the height.
    width, height = image.size or (1, 1)
    if "radiusX" in value:
        rx = number(value["radiusX"], f"{name}.radiusX") / 100 * width
        ry = number(value.get("radiusY"), f"{name}.radiusY") / 100 * height
        if not again:
            export.changed["ellipses, read as the box around them"] += 1
        x1, y1, x2, y2 = around_ellipse(x * width, y * height, rx, ry, degrees)
        return x1 / width, y1 / height, x2 / width, y2 / height
    w, h = number(value.get("width"), f"{name}.width") / 100, number(value.get("height"), f"{name}.height") / 100
    if not turned(degrees):
        return x, y, x + w, y + h
    if rotated == "error":
        raise refuse_turned(f"{name}.rotation", f"a box turned by {degrees:g} degrees")
    if not again:
        export.changed[TURNED] += 1
    box = (x * width, y * height, (x + w) * width, (y + h) * height)
    x1, y1, x2, y2 = around_turned(box, degrees, (box[0], box[1]))
    return x1 / width, y1 / height, x2 / width, y2 / height


def _read_answers(
    results: list[Any],
    data: Mapping[str, Any],
    image: LabelledImage,
    export: Export,
    questions: Mapping[str, str | None],
    unknown: dict[str, None],
    used: set[str],
) -> None:
    for index, given in enumerate(results):
        place = f"result[{index}]"
        kind = text(mapping(given, place).get("type"), f"{place}.type")
        value = mapping(given.get("value") or {}, f"{place}.value")
        if kind not in _ANSWERS:
            export.left_out[f"results of type {kind[:40]}"] += 1
        elif "x" in value or "points" in value:
            export.left_out["texts and choices of single regions"] += 1
        else:
            control = text(given.get("from_name"), f"{place}.from_name")
            used.add(control)
            if control not in questions:
                unknown[control] = None
            elif (question := questions[control]) is None:
                export.left_out[f"answers of {control}"] += 1
            else:
                try:
                    image.answers.append(
                        _answer(value, kind, f"{place}.value", _filled(question, data, place), export)
                    )
                except BadField as error:  # the other controls are known all the same
                    image.refuse(error)


def _answer(value: Mapping[str, Any], kind: str, name: str, question: str, export: Export) -> Answer:
    key = "text" if kind == "textarea" else "choices"
    given = value.get(key)
    said = [given] if isinstance(given, str) else items(given, f"{name}.{key}")
    said = [text(one, f"{name}.{key}") for one in said]
    if not said:
        raise BadField(f"{name}.{key}", "is empty")
    if kind == "choices":
        for choice in said:
            export.classes.setdefault(choice, choice)
        return Answer(question, choices=tuple(said))
    if len(said) > 1:
        raise BadField(f"{name}.text", f"holds {len(said)} texts, and a question has one answer: join them")
    return Answer(question, said[0])


def _filled(question: str, data: Mapping[str, Any], place: str) -> str:
    """The question with what the task's data has in its places."""

    def fill(found: re.Match[str]) -> str:
        if found[1] not in data:
            raise BadField(f"{place}.from_name", f"the question needs data.{found[1]}, and the task has none")
        return text(data[found[1]], f"data.{found[1]}")

    return _PLACE.sub(fill, question)
