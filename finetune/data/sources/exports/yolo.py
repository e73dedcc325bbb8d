"""Layout `yolo`: a text file for each image, and `data.yaml` with the names of the classes.

    data.yaml                 names: [car, sign], train: images/train, val: images/val
    images/train/a.jpg
    labels/train/a.txt        0 0.3 0.3 0.4 0.4

A line is a class and the centre, width and height of a box in fractions of the upright image; or a class and the
points of a polygon, which is read as the box around it. Labels are where Ultralytics looks for them: `images` in the
path replaced by `labels`, or beside the image. Without `data.yaml`, names may be in `classes.txt` or `obj.names`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune.data.sample import BadField, DataError, Origin
from finetune.data.sources.exports.labelled import Box, Export, LabelledImage, around, written_number
from finetune.data.sources.local_files import data_errors, open_data

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Endings of what counts as an image in the folders."""
_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_NAME_LISTS = ("classes.txt", "obj.names")
_CLASS = re.compile("[0-9]{1,9}")
_FARTHEST = 1.5
"""Fraction beyond which a number is none: it is of pixels, or of another layout."""
_LONGEST = 1 << 24  # bytes of a text file


def read_yolo(path: Path, name: str, split: str | None) -> Export:
    """Read the labels of all images of a split.

    Args:
        path, name: the folder or its data.yaml, and what messages call it.
        split: train, val or test; None is train where there is a data.yaml, else all images.

    Raises:
        DataError: no such folder or split, or one without images; or a data.yaml that cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    settings = _settings(path, name)
    export = Export()
    export.classes = _names(settings, folder, name)
    keypoints = settings.get("kpt_shape") is not None
    found = _images(folder, settings, split, name)
    if not found:
        raise DataError(f"{name}: there is no image in it (of {', '.join(IMAGES)})")
    labels: dict[Path, Path] = {}
    for file in found:
        label = _label_file(file)
        shown = _shown(label, folder, name)
        image = LabelledImage(_relative(file, folder), Origin(shown, 1), unit="fractions")
        export.images.append(image)
        if label in labels:
            image.refuse(BadField("image", f"{file.name} and {labels[label].name} have one label file"))
            continue
        labels[label] = file
        if label.is_file():
            _read_labels(label, shown, image, export, keypoints)
    stray = _stray_labels(labels)
    if stray:
        export.left_out["label files without an image"] = stray
    return export


def _settings(path: Path, name: str) -> Mapping[str, Any]:
    """The contents of data.yaml; empty where there is none."""
    files = [path]
    if path.is_dir():
        files = sorted(file for ending in ("*.yaml", "*.yml") for file in path.glob(ending))
        named = [file for file in files if file.stem in ("data", "dataset")]
        files = named if len(named) == 1 else files
    elif path.suffix.lower() not in (".yaml", ".yml"):
        raise DataError(f"{name}: layout yolo is a folder, or the data.yaml in it")
    if not files:
        return {}
    if len(files) > 1:
        listed = ", ".join(file.name for file in files)
        raise DataError(f"{name}: there are several YAML files in it, {listed}: give the one that has the names")
    try:
        settings = yaml.safe_load(_read_text(files[0], name))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(
            f"{name}: {files[0].name} cannot be read as YAML ({' '.join(str(error).split())})"[:500]
        ) from error
    if not isinstance(settings, dict):
        raise DataError(f"{name}: {files[0].name} must hold keys such as names and train")
    return settings


def _names(settings: Mapping[str, Any], folder: Path, name: str) -> dict[str, str]:
    """Number -> name of each class."""
    given = settings.get("names")
    if given is None:
        for listed in _NAME_LISTS:
            if (folder / listed).is_file():
                given = [line.strip() for line in _read_text(folder / listed, name).splitlines() if line.strip()]
                break
    if given is None:
        return {}
    pairs = (
        list(enumerate(given)) if isinstance(given, list) else list(given.items()) if isinstance(given, dict) else []
    )
    if not pairs:
        raise DataError(f"{name}: `names` must be a list of names, or number: name")
    names: dict[str, str] = {}
    for number_of, given_name in pairs:
        if not str(number_of).isdecimal() or isinstance(number_of, bool):
            raise DataError(f"{name}: `names`: {number_of!r} is no number of a class"[:300])
        if (
            not isinstance(given_name, str | int | float)
            or isinstance(given_name, bool)
            or not str(given_name).strip()
        ):
            raise DataError(f"{name}: `names`: the name of {number_of} must be text, not {given_name!r}"[:300])
        names[str(int(number_of))] = str(given_name)
    count = settings.get("nc")
    if isinstance(count, int) and count != len(names):
        raise DataError(f"{name}: `nc` is {count}, and there are {len(names)} names")
    return names


def _images(folder: Path, settings: Mapping[str, Any], split: str | None, name: str) -> list[Path]:
    """The images of a split, in the order of their paths."""
    wanted = next((key for key, names in _SPLITS.items() if split in names), split)
    keys = _SPLITS.get(wanted or "train", (wanted or "train",))
    given = next((settings[key] for key in keys if settings.get(key)), None)
    if given is not None:
        entries = given if isinstance(given, list) else [given]
        return [file for entry in entries for file in _entry(folder, settings, entry, name)]
    if any(settings.get(key) for names in _SPLITS.values() for key in names):
        there = ", ".join(key for names in _SPLITS.values() for key in names if settings.get(key))
        raise DataError(f"{name}: has no split {split or 'train'!r} but {there}: set split")
    if wanted is None:
        return _walk(folder / "images" if (folder / "images").is_dir() else folder)
    for key in keys:
        for place in (folder / "images" / key, folder / key / "images", folder / key):
            if place.is_dir():
                return _walk(place)
    raise DataError(f"{name}: has no folder for split {split!r}, such as images/{keys[0]}")


def _entry(folder: Path, settings: Mapping[str, Any], entry: Any, name: str) -> list[Path]:
    """The images of one folder or list of files that data.yaml names."""
    if not isinstance(entry, str) or not entry.strip():
        raise DataError(f"{name}: a split must be a folder, or a text file with a path a line, not {entry!r}"[:300])
    base = settings.get("path")
    bases = [folder / base] if isinstance(base, str) and base else []
    # `path` is often one of the machine that made it; and Roboflow writes ../train/images for train/images.
    plain = re.sub(r"^(\.\./)+", "", entry.replace("\\", "/"))
    for place in (*(base / entry for base in bases), folder / entry, folder / plain):
        try:
            if place.is_dir():
                return _walk(place)
            if place.is_file():
                lines = [line.strip() for line in _read_text(place, name).splitlines() if line.strip()]
                return [Path(os.path.normpath(place.parent / line)) for line in lines]
        except (OSError, ValueError) as error:
            raise DataError(f"{name}: the split {entry[:200]!r} cannot be read ({error})"[:500]) from error
    raise DataError(f"{name}: there is no folder or list {entry[:200]!r}, which data.yaml names for the split")


def _walk(folder: Path) -> list[Path]:
    with data_errors(folder):
        found = [file for file in folder.rglob("*") if file.suffix.lower() in IMAGES and file.is_file()]
    return sorted(found)


def _label_file(image: Path) -> Path:
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _stray_labels(labels: Mapping[Path, Path]) -> int:
    """Label files in the same folders that belong to no image; lists of names are none."""
    folders = {label.parent for label in labels}
    there = (file for folder in folders if folder.is_dir() for file in folder.glob("*.txt"))
    return sum(file not in labels and file.name not in ("classes.txt", "README.txt") for file in there)


def _relative(file: Path, folder: Path) -> str:
    """The path below the folder; as it is where it is elsewhere."""
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file.absolute())


def _shown(label: Path, folder: Path, name: str) -> str:
    top = name if Path(name).is_dir() else str(Path(name).parent)
    return f"{top}/{label.relative_to(folder).as_posix()}" if label.is_relative_to(folder) else str(label)


def _read_labels(file: Path, name: str, image: LabelledImage, export: Export, keypoints: bool) -> None:
    for row, line in enumerate(_read_text(file, name).splitlines(), start=1):
        values = line.split()
        if not values:
            continue
        try:
            _read_line(values, f"line {row}", image, export, keypoints)
        except BadField as error:
            image.refuse(error)


def _read_line(values: Sequence[str], place: str, image: LabelledImage, export: Export, keypoints: bool) -> None:
    label = values[0].removesuffix(".0")
    if not _CLASS.fullmatch(label):
        raise BadField(place, f"must begin with the number of a class, not {values[0]!r}"[:200])
    label = str(int(label))
    if export.classes and label not in export.classes:
        raise BadField(place, f"class {label} has no name; there are {len(export.classes)}")
    # Of keypoints, a third number says whether one is visible: no fraction.
    posed = keypoints and len(values) > 5
    given = [_fraction(value, place) for value in (values[1:5] if posed else values[1:])]
    box: Box
    if len(given) == 4:
        x, y, width, height = given
        if width <= 0 or height <= 0:
            raise BadField(place, f"its width is {width:g} and its height {height:g}")
        if posed:
            export.left_out["lists of keypoints"] += 1
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    elif len(given) >= 6 and len(given) % 2 == 0:
        export.changed["polygons and turned boxes, read as the upright box around them"] += 1
        box = around(given[0::2], given[1::2], place)
    else:
        raise BadField(
            place,
            f"has {len(values)} values; a box has 5 (class x y width height), a polygon a class and pairs of numbers"
            + ("; a sixth one is the score of a detector" if len(values) == 6 else ""),
        )
    export.add_object(image, label, box, place, numbered=True)


def _fraction(value: str, place: str) -> float:
    found = written_number(value, place)
    if not -_FARTHEST <= found <= _FARTHEST:
        raise BadField(place, f"{value} is no fraction of the image: are these pixels?"[:200])
    return found


def _read_text(file: Path, name: str) -> str:
    with open_data(file) as opened:
        data = opened.read(_LONGEST + 1)
    if len(data) > _LONGEST:
        raise DataError(f"{name}: {file.name} has more than {_LONGEST:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: {file.name}: byte {error.start} is not UTF-8") from error
