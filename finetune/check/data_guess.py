"""How the rows of a data file may be read: formats by the names of its columns, the best of them by trying."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.check.export_layout import asked_names
from finetune.data.checks.problems import find_problems
from finetune.data.sample import BadField, BadRow, Origin, Sample
from finetune.data.samples import Samples
from finetune.data.sources.rows import Rows
from finetune.errors import InputError, UserError
from finetune.recipe.sources import LAYOUTS, Layout, Source

_IMAGE = ("image", "images", "img", "image_path", "image_file", "image_url", "file_name", "filename", "path", "file")
IMAGE_COLUMNS = _IMAGE
"""Names that a column of images may have."""
_IMAGES = ("images", "image", "img", "image_path", "image_paths", "image_list")
_QUESTION = ("question", "query", "questions", "instruction", "prompt")
_ANSWERS = ("answers", "answer", "label", "labels", "response", "output", "completion")
_NO_FIELDS = ("id", "idx", "index", "split", "width", "height", "source", "license", "url")
_TRIED = 100  # rows of an export
_ROOTS = 50  # folders where images are looked for
_BESIDE_IMAGES = ("annotations", "annotation", "labels", "json")
"""Names of folders with exports whose images are in folders beside them, as COCO's are."""
_ROLES: tuple[tuple[str, Mapping[str, Sequence[str]], Mapping[str, Sequence[str]]], ...] = (
    # format, the roles that it needs, the roles that may be there; each with the names that a column may have
    ("messages", {"messages": ("messages",)}, {"images": _IMAGES, "system": ("system", "system_prompt")}),
    ("swift", {"messages": ("messages",), "objects": ("objects",)}, {"images": _IMAGES, "system": ("system",)}),
    ("qwen_json", {"conversations": ("conversations", "conversation")}, {"system": ("system",)}),
    ("llava", {"conversations": ("conversations", "conversation")}, {"image": _IMAGE[:6], "system": ("system",)}),
    ("texts", {"texts": ("texts",)}, {"images": _IMAGES}),
    (
        "swift",
        {"query": ("query", "instruction"), "response": ("response", "output")},
        {"history": ("history",), "images": _IMAGES, "system": ("system",), "objects": ("objects",)},
    ),
    ("messages", {"prompt": ("prompt",), "completion": ("completion", "response")}, {"images": _IMAGES}),
    ("vqa", {"image": _IMAGE, "question": _QUESTION, "answers": _ANSWERS}, {}),
    (
        "grounding",
        {
            "image": _IMAGE,
            "phrase": ("phrase", "expression", "sentence", "sentences", "label"),
            "box": ("box", "bbox"),
        },
        {},
    ),
    (
        "grounding",
        {"image": _IMAGE, "phrase": ("phrase", "phrases", "expression"), "boxes": ("boxes", "bboxes")},
        {},
    ),
    ("grounding", {"image": _IMAGE, "boxes": ("boxes", "bboxes"), "labels": ("labels", "categories")}, {}),
    ("caption", {"image": _IMAGE, "caption": ("caption", "captions", "description", "sentences", "text")}, {}),
)


@dataclass(frozen=True)
class Guess:
    """A way to read the rows.

    Attributes:
        source: as a recipe has it.
        grounding: whether markup in texts is read.
        fit: rows of those looked at that can be read without a problem.
        also: other values of `box_form` that fit as many rows.
        looked_at: rows that were tried.
        images_root: folder of the images, where that is not the data's own.
    """

    source: Source
    grounding: bool
    fit: int
    also: Sequence[str] = field(default=())
    looked_at: int = 0
    images_root: str | None = None


def guess(
    path: str, rows: Rows, columns: Sequence[str], places: Sequence[int], keys: Mapping[str, str] | None = None
) -> Guess | None:
    """The format, columns and folder of images that most of the rows fit; None where no format has such columns.

    Other folders of images than the data's own are tried where no row fits; one is taken if it alone fits best.

    Args:
        path: of the data.
        rows: of the data; `columns`, all their names.
        places: rows to try, from 0.
        keys: of the source, by which its file was read: `encoding`, `delimiter`.
    """
    best = _guess(path, rows, columns, places, keys or {}, None)
    if best is None or best.fit:
        return best
    tried = [_guess(path, rows, columns, places, keys or {}, root) for root in _other_roots(Path(path))]
    fitting = [found for found in tried if found is not None and found.fit]
    most = max((found.fit for found in fitting), default=0)
    # Of two folders with files of the same names, neither is clearly meant.
    clear = [found for found in fitting if found.fit == most]
    return clear[0] if len(clear) == 1 else best


def _other_roots(path: Path) -> list[str]:
    """Folders where images may be: those in the data's folder, the folder it is in, and those beside it."""
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return []  # a pattern
    above = Path(os.path.normpath(folder / ".."))
    inside = _folders(folder)
    roots = [*inside, *(inner for outer in inside for inner in _folders(outer)), above, *_folders(above)]
    own = folder.resolve()
    return [str(root) for root in dict.fromkeys(roots) if root.resolve() != own][:_ROOTS]


def _folders(folder: Path) -> list[Path]:
    try:
        inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[:1] != ".")
    except OSError:
        return []
    return [folder / name for name in inside[:_ROOTS]]


def _guess(
    path: str,
    rows: Rows,
    columns: Sequence[str],
    places: Sequence[int],
    keys: Mapping[str, str],
    root: str | None,
) -> Guess | None:
    best: Guess | None = None
    for source in _candidates(path, columns, keys):
        samples = Samples([source], images_root=root, rows=[_SomeRows(rows, places)])
        for grounding in (False, True):
            fit = len(places) - _bad_rows(samples, grounding)
            found = Guess(source, grounding, fit, looked_at=len(places), images_root=root)
            if best is None or found.fit > best.fit:
                best = found
            elif found.fit == best.fit and source.box_form == "xywh" and best.source.box_form == "xyxy":
                best = replace(best, also=("xywh",))
    if best is None or not best.fit:
        fields = _fields_of(path, rows, columns, places, keys)
        if fields is not None:
            samples = Samples([fields], images_root=root, rows=[_SomeRows(rows, places)])
            fit = len(places) - _bad_rows(samples, False)
            found = Guess(fields, False, fit, looked_at=len(places), images_root=root)
            best = found if best is None or found.fit else best
    return best


def guess_export(path: Path, layout: Layout) -> Guess:
    """How the export of an annotation tool may be read: the format and folder of images that most rows fit.

    Raises:
        InputError: it cannot be read as one of that layout.
    """
    best: Guess | None = None
    failed: InputError | None = None
    for row_format in LAYOUTS[layout]:
        annotations: dict[str, Any] = {"layout": layout}
        if row_format == "vqa":
            annotations["questions"] = {name: f"What is the {name}?" for name in asked_names(path)}
            if not annotations["questions"]:
                continue
        source = Source.model_validate({"path": str(path), "format": row_format, "annotations": annotations})
        roots: list[str | None] = [None, str(path.parent)] if layout in ("labelme", "yolo") else [None]
        if path.parent.name.lower() in _BESIDE_IMAGES:
            roots.append(os.path.normpath(path.parent / ".."))
        for root in roots:
            try:
                samples = Samples([source], images_root=root)
            except InputError as error:
                failed = failed or error
                continue
            step = max(1, len(samples) // _TRIED)
            places = list(range(0, len(samples), step))[:_TRIED]
            bad = sum(_bad_rows(samples, False, place) for place in places)
            found = Guess(source, False, len(places) - bad, looked_at=len(places), images_root=root)
            if best is None or found.fit > best.fit:
                best = found
    if best is None:
        raise failed or UserError(f"{path}: looks like layout {layout}, and has nothing that is trained on")
    return best


def _fields_of(
    path: str, rows: Rows, columns: Sequence[str], places: Sequence[int], keys: Mapping[str, str]
) -> Source | None:
    """A row as a document with a column a field; None without an image column, or without another one."""
    lower = {column.lower(): column for column in reversed(columns)}
    image = _named(lower, _IMAGE)
    scalar = dict.fromkeys(columns)
    for place in places:
        for row in rows.scan(place, place + 1):
            if isinstance(row, Mapping):
                for column, value in row.items():
                    if not isinstance(value, str | int | float | None):
                        scalar.pop(column, None)
    fields = [column for column in scalar if column != image and column.lower() not in _NO_FIELDS]
    if image is None or image not in columns or not fields:
        return None
    given = {"columns": {"image": image}} if image != "image" else {}
    return Source.model_validate(
        {"path": path, "format": "fields", "fields": fields, "reply": "json", **given, **keys}
    )


def _candidates(path: str, columns: Sequence[str], keys: Mapping[str, str]) -> Iterator[Source]:
    lower = {column.lower(): column for column in reversed(columns)}
    for name, needed, optional in _ROLES:
        given = {role: _named(lower, names) for role, names in needed.items()}
        if None in given.values():
            continue
        given |= {role: _named(lower, names) for role, names in optional.items()}
        other_names = {role: column for role, column in given.items() if column is not None and column != role}
        if name == "vqa" and other_names.get("answers") == "answer":
            del other_names["answers"]
        if name == "llava" and other_names.get("image") == "images":
            del other_names["image"]
        for box_form in ("xyxy", "xywh") if name == "grounding" else (None,):
            form: dict[str, str] = {} if box_form is None else {"box_form": box_form}
            if "labels" in needed:
                form["prompt"] = "Find all objects."
            yield Source.model_validate({"path": path, "format": name, "columns": other_names, **form, **keys})


def _named(lower: Mapping[str, str], names: Sequence[str]) -> str | None:
    return next((lower[name] for name in names if name in lower), None)


def _bad_rows(samples: Samples, grounding: bool, place: int | None = None) -> int:
    """How many rows (or one place) have a sample that cannot be used; rows with several samples count once."""
    bad = set()
    first, last = (0, len(samples)) if place is None else (place, place + 1)
    for sample in samples.scan(first, last):
        if isinstance(sample, BadRow) or not _can_be_used(sample, grounding):
            bad.add(sample.origin)
    return len(bad)


def _can_be_used(sample: Sample, grounding: bool) -> bool:
    try:
        return not find_problems(sample, grounding=grounding, markup_as_text=frozenset())[0]
    except BadField:
        return False


class _SomeRows(Rows):
    """Some of the rows of a source, in their order."""

    def __init__(self, rows: Rows, places: Sequence[int]):
        self.name, self.folder = rows.name, rows.folder
        self._rows, self._places = rows, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._rows[self._places[index]]

    def scan(self, start: int, stop: int) -> Iterator[Mapping[str, Any] | BadRow]:
        for place in self._places[start:stop]:
            yield from self._rows.scan(place, place + 1)

    def origin(self, index: int) -> Origin:
        return self._rows.origin(self._places[index])

    def fingerprint(self) -> str:
        return self._rows.fingerprint()
