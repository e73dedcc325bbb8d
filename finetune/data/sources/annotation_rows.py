"""Rows of the export of an annotation tool, one file or folder, as the formats read them.

    {"image": "a.jpg", "phrase": "car", "boxes": [[64, 48, 320, 240]]}              rows: class
    {"image": "a.jpg", "boxes": [[64, 48, 320, 240]], "labels": ["car"]}             rows: image
    {"image": "a.jpg", "caption": ["A car.", "A red car."]}                          format: caption
    {"image": "a.jpg", "question": "What is the total?", "answers": ["$ 12.40"]}     format: vqa

The export is read whole; its rows are kept as text, some hundred bytes each.
"""

import json
from array import array
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from finetune.data.annotated_boxes import ANNOTATED
from finetune.data.sample import BadField, BadRow, DataError, Origin
from finetune.data.sources.exports.coco import read_coco
from finetune.data.sources.exports.cvat import read_cvat
from finetune.data.sources.exports.find_images import ImageFinder
from finetune.data.sources.exports.label_studio import read_label_studio
from finetune.data.sources.exports.labelled import Box, Export, LabelledImage
from finetune.data.sources.exports.labelme import read_labelme
from finetune.data.sources.exports.via import read_via
from finetune.data.sources.exports.yolo import read_yolo
from finetune.data.sources.local_files import data_errors
from finetune.data.sources.rows import Rows
from finetune.errors import InputError, MissingFileError
from finetune.recipe.problems import nearest
from finetune.recipe.sources import Annotations
from qwenvl.text.boxes import ref_markup

_PROBLEM = "problem"
_LISTED = 30  # classes in a message


class AnnotationRows(Rows):
    """The rows of an export.

    Args:
        path: the export.
        row_format: that the rows are for: grounding, caption or vqa.
        split: of a YOLO folder.
        annotations: how the export is read.
        root: folder of the images; None is that of the export.

    Attributes:
        notes: what was left out or read as something else, in words; nothing else was.

    Raises:
        MissingFileError: there is nothing at `path`.
        DataError: the export cannot be read, is not of the layout, or has no class of a name that the recipe maps.
    """

    def __init__(
        self, path: Path, row_format: str, split: str | None, annotations: Annotations, root: Path | None = None
    ):
        self.name = str(path)
        if not path.exists():
            raise MissingFileError(f"data: there is no file or folder {path} (relative paths start at {Path.cwd()})")
        self.folder = (path if path.is_dir() else path.parent).absolute()
        with data_errors(path):
            export = _read(path, self.name, row_format, split, annotations)
            finder = ImageFinder(self.folder if root is None else root.absolute(), self.folder)
            for image in export.images:
                _find(image, finder)
        self._starts = array("q", [0])  # bytes; of each row, and of the end
        self._numbers = array("q")
        self._files: list[str] = []  # only where the rows are of several files
        lines = bytearray()
        for origin, row in _rows(export, row_format, annotations, self.name):
            lines += json.dumps(row).encode()
            self._starts.append(len(lines))
            self._numbers.append(origin.row)
            self._files.append(origin.file)
        self._lines = bytes(lines)
        if len(set(self._files)) == 1:
            self._files = self._files[:1]
        self.notes = _notes(export, finder)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        index = range(len(self))[index]
        row = json.loads(self._lines[self._starts[index] : self._starts[index + 1]])
        if _PROBLEM in row:
            raise BadRow(self.origin(index), *row[_PROBLEM])
        return row

    def origin(self, index: int) -> Origin:
        """The file, and the number of the image in it, from 1."""
        index = range(len(self))[index]
        return Origin(self._files[index if len(self._files) > 1 else 0], self._numbers[index])

    def fingerprint(self) -> str:
        return sha256(self._lines).hexdigest()


def _read(path: Path, name: str, row_format: str, split: str | None, annotations: Annotations) -> Export:
    if annotations.layout not in ("labelme", "yolo") and not path.is_file():
        raise DataError(f"{name}: layout {annotations.layout} is a file, and this is a folder: give the file")
    match annotations.layout:
        case "coco":
            return read_coco(path, name, "caption" if row_format == "caption" else "grounding")
        case "label_studio":
            questions = annotations.questions if row_format == "vqa" else None
            return read_label_studio(path, name, questions, annotations.rotated)
        case "labelme":
            return read_labelme(path, name, annotations.rotated)
        case "cvat":
            return read_cvat(path, name, annotations.rotated)
        case "via":
            return read_via(path, name, annotations.label)
        case "yolo":
            return read_yolo(path, name, split)


def _find(image: LabelledImage, finder: ImageFinder) -> None:
    """Set the image's name to its path from the root of the images."""
    if image.problem is None:
        try:
            image.name = finder.find(image.name, image.folder)
        except BadField as error:
            image.refuse(error)


def _rows(
    export: Export, row_format: str, annotations: Annotations, name: str
) -> Iterator[tuple[Origin, dict[str, Any]]]:
    """The rows of all images; what makes none is counted in `export.left_out`."""
    phrases = _phrases(export, annotations, name)
    first: dict[str, Origin] = {}
    for image in export.images:
        if image.problem is None and row_format != "vqa":
            before = first.setdefault(image.name, image.origin)
            if before is not image.origin:
                image.refuse(BadField("image", f"{image.name!r} is in the export twice, first as {before}"[:300]))
        if image.problem is not None:
            field, reason = image.problem
            named = f"{image.name[:100]}: " if image.name else ""
            yield image.origin, {_PROBLEM: [field, f"{reason} ({named.removesuffix(': ')})" if named else reason]}
        elif row_format == "caption":
            if image.captions:
                yield image.origin, {"image": image.name, "caption": image.captions}
            else:
                export.left_out["images without a caption"] += 1
        elif row_format == "vqa":
            yield from _answers(image, export, phrases)
        else:
            for row in _objects(image, export, annotations, phrases):
                note = {"fractions": image.unit == "fractions", "size": image.size}
                yield image.origin, {"image": image.name, **row, ANNOTATED: note}


def _objects(
    image: LabelledImage, export: Export, annotations: Annotations, phrases: Mapping[str, str | None]
) -> Iterator[dict[str, Any]]:
    named = []
    for label, box in image.objects:
        phrase = phrases[label]
        if phrase is None:
            export.left_out["objects of classes that the recipe leaves out"] += 1
        else:
            named.append((phrase, box))
    if not named:
        if not image.annotated:
            export.left_out["images that nobody annotated"] += 1
        elif not image.complete:
            export.left_out["images with nothing but what is left out"] += 1
        elif annotations.unlabelled == "skip":
            export.left_out["images without an object (annotations.unlabelled: keep trains on them)"] += 1
        elif annotations.rows == "image":
            yield {"boxes": [], "labels": []}
        else:
            # One class, the same each time: all of them would be more rows than the other images have.
            known = sorted({phrase for phrase in phrases.values() if phrase is not None})
            if known:
                number = int.from_bytes(sha256(image.name.encode(errors="replace")).digest()[:8], "big")
                yield {"phrase": known[number % len(known)], "boxes": []}
    elif annotations.rows == "image":
        yield {"boxes": [box for _, box in named], "labels": [phrase for phrase, _ in named]}
    else:
        boxes: dict[str, list[Box]] = {}
        for phrase, box in named:
            boxes.setdefault(phrase, []).append(box)
        for phrase, own in boxes.items():
            yield {"phrase": phrase, "boxes": own}


def _answers(
    image: LabelledImage, export: Export, phrases: Mapping[str, str | None]
) -> Iterator[tuple[Origin, dict[str, Any]]]:
    if not image.annotated:
        export.left_out["images that nobody annotated"] += 1
    elif not image.answers:
        export.left_out["images without an answer"] += 1
    for answer in image.answers:
        told = [phrase for choice in answer.choices if (phrase := phrases[choice]) is not None]
        if answer.choices and not told:
            export.left_out["answers of choices that the recipe leaves out"] += 1
            continue
        text = ", ".join(told) if answer.choices else answer.text
        yield image.origin, {"image": image.name, "question": answer.question, "answers": [text]}


def _phrases(export: Export, annotations: Annotations, name: str) -> dict[str, str | None]:
    """Class -> what it is called, None where it is left out.

    Raises:
        DataError: a class of the recipe that the export has not, one without a name, or a name that no phrase can be.
    """
    used = {label: label for image in export.images for label, _ in image.objects}
    names = used | export.classes
    by_name: dict[str, list[str]] = {}
    for label, own in names.items():
        by_name.setdefault(own, []).append(label)
    given: dict[str, str | None] = {}
    for key, phrase in annotations.classes.items():
        labels = by_name.get(key) or ([key] if key in names else [])
        if not labels:
            meant = nearest(key, list(by_name))
            said = f"did you mean {' or '.join(meant)}? " if meant else ""
            raise DataError(
                f"{name}: annotations.classes: there is no class {key!r}; {said}It has {_listed(list(by_name))}"
            )
        for label in labels:
            if label in given:
                raise DataError(f"{name}: annotations.classes: {names[label]!r} is named twice, as {key!r} too")
            given[label] = phrase
    phrases = {label: given.get(label, own) for label, own in names.items()}
    numbers = [label for label in used if label not in export.classes and label not in given]
    if numbers:
        raise DataError(
            f"{name}: nothing says what class {_listed(numbers)} is: give names in data.yaml, or in the recipe: "
            f"annotations.classes: {{{numbers[0]}: a name, or null}}"
        )
    for phrase in phrases.values():
        if phrase is not None:
            try:
                ref_markup(phrase)
            except InputError as error:
                raise DataError(f"{name}: class {phrase[:80]!r} cannot be asked for: {error}") from error
    return phrases


def _listed(names: list[str]) -> str:
    shown = ", ".join(name[:40] for name in names[:_LISTED]) or "none"
    return f"{shown} and {len(names) - _LISTED} more" if len(names) > _LISTED else shown


def _notes(export: Export, finder: ImageFinder) -> list[str]:
    notes = []
    if export.left_out:
        notes.append("left out: " + "; ".join(f"{count:,} {what}" for what, count in sorted(export.left_out.items())))
    if export.changed:
        notes.append("; ".join(f"{count:,} {what}" for what, count in sorted(export.changed.items())))
    if finder.example is not None:
        named, found = finder.example
        notes.append(
            f"{finder.by_name:,} images found by their names alone, such as {named[:100]!r} as {found[:100]!r}"
        )
    return notes
