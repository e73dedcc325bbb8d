"""Which annotation tool's export a file or folder looks like, by its first bytes or its files: `looks_like`."""

import json
import re
from pathlib import Path

from finetune.recipe.sources import Layout

READ = 1 << 20
"""Bytes of a file that are looked at."""
_FILES = 200  # of a folder

# Keys that a layout has, all of them, in any order.
_KEYS: dict[Layout, tuple[str, ...]] = {
    "via": ("regions", "shape_attributes", "region_attributes", "filename"),
    "label_studio": ("annotations", "result", "data"),
    "labelme": ("shapes", "points", "imagePath"),
}


def looks_like(path: Path) -> Layout | None:
    """The layout that a path looks like; None where it looks like none, or cannot be read. It is a guess."""
    try:
        return _of_folder(path) if path.is_dir() else _of_file(path)
    except OSError:
        return None


def _of_file(path: Path) -> Layout | None:
    if path.name.lower() in ("data.yaml", "data.yml") and is_yolo_yaml(path):
        return "yolo"
    if path.suffix.lower() not in (".json", ".xml"):
        return None
    with path.open("rb") as file:
        begin = file.read(READ)
        file.seek(max(0, path.stat().st_size - READ))
        text = (begin + file.read(READ)).decode(errors="replace")
    if path.suffix.lower() == ".xml":
        return "cvat" if "<annotations" in text and "<image" in text else None
    keys = set(re.findall(r'"(\w+)"\s*:', text))
    starts = text.lstrip("\ufeff \t\r\n")[:1]
    if starts == "{" and {"images", "annotations"} <= keys and {"image_id", "file_name"} <= keys:
        return "coco"
    for layout, needed in _KEYS.items():
        if set(needed) <= keys and (layout != "label_studio" or starts == "["):
            return layout
    return None


def _of_folder(folder: Path) -> Layout | None:
    for name in ("data.yaml", "data.yml"):
        if is_yolo_yaml(folder / name):
            return "yolo"
    if (folder / "labels").is_dir() and (folder / "classes.txt").is_file():
        return "yolo"
    files = []
    for number, file in enumerate(folder.glob("*.json")):
        if number == _FILES:
            break
        files.append(file)
    first = min(files, default=None)
    return "labelme" if first is not None and _of_file(first) == "labelme" else None


def is_yolo_yaml(path: Path) -> bool:
    """Whether a YAML file has the class names of a YOLO folder, and not a recipe."""
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")[:READ]
    keys = set(re.findall(r"^(\w+)\s*:", text, re.MULTILINE))
    return "names" in keys and not {"model", "data", "output"} & keys


def asked_names(path: Path) -> list[str]:
    """The names of the text areas and choices of a Label Studio export, in its order; none in another file."""
    try:
        tasks = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    names: dict[str, None] = {}
    for task in tasks if isinstance(tasks, list) else []:
        for annotation in task.get("annotations", []) if isinstance(task, dict) else []:
            for result in annotation.get("result", []) if isinstance(annotation, dict) else []:
                if isinstance(result, dict) and result.get("type") in ("textarea", "choices"):
                    names[str(result.get("from_name"))] = None
    return list(names)
