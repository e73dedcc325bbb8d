"""`finetune check FILE`: what a data file or folder holds, without a recipe, and the section of one that reads it."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.check.data_guess import IMAGE_COLUMNS, Guess, guess, guess_export
from finetune.check.export_layout import looks_like
from finetune.check.sample_preview import image_name, one_line
from finetune.data.checks.problems import find_problems, together
from finetune.data.message_parts import content_parts, image_sources
from finetune.data.row_progress import RowProgress
from finetune.data.sample import SHOWN_PROBLEMS, UNKNOWN_TEXT, BadField, BadRow, Sample
from finetune.data.samples import Samples
from finetune.data.sources.rows import Rows
from finetune.data.sources.sources import read_source
from finetune.data.summary import name_counts, problem_kinds
from finetune.errors import InputError, UserError
from finetune.recipe.sources import Layout, Source
from finetune.recipe.yaml_file import write_yaml
from finetune.terminal import Say, say, terminal_text
from qwenvl.text.chat import is_trained

LOOKED_AT = 100
"""Rows by which the format is guessed, from all parts of the data."""
FILE_KEYS = ("encoding", "delimiter", "split")
"""Keys of a source by which its file is read, and which `check FILE` takes."""
_SHOWN_KINDS = 10
_LONGEST_TEXT = 300  # characters of a shown turn


def check_data(path: Path, *, samples: int = 3, keys: Mapping[str, str] | None = None, say: Say = say) -> None:
    """Look at all rows of a data file and print what is in them, and the `data` section that reads them.

    Lengths need a model's tokenizer, so only a check of a recipe knows them.

    Args:
        path: file or folder.
        samples: rows to show.
        keys: of the source, by which the file is read: `encoding`, `delimiter`, `split`.
        say: prints a line.

    Raises:
        InputError: the data cannot be opened, or a key is wrong.
        UserError: no format reads its rows, or some rows cannot be used; raised after everything was shown.
    """
    keys = keys or {}
    layout = None if keys else looks_like(path)
    if layout is not None:
        say("data", f"{one_line(path)}: looks like an annotation export of layout {layout}")
        if _read_export(path, layout, say, samples):
            return
    try:
        source = Source.model_validate({"path": str(path), "format": "messages", **keys})
    except ValidationError as error:
        raise UserError("; ".join(str(one["msg"]) for one in error.errors())) from error
    rows = read_source(source)
    if not len(rows):
        raise UserError(f"{path}: holds no rows")
    step = max(1, len(rows) // LOOKED_AT)
    places = list(range(0, len(rows), step))[:LOOKED_AT]
    columns = _columns(rows, places)
    say("data", f"{one_line(path)}: {len(rows):,} rows")
    say("columns", one_line(", ".join(columns)[:1000]) or "none")
    for name, cell in _cells_of_unknown_text(rows, places).items():
        say("note", one_line(f"column {name}: the sheet shows cells in a way that is not known here, such as {cell}"))
    found = guess(str(path), rows, list(columns), places, keys)
    if found is None or not found.fit:
        if columns and all(name.lower() in IMAGE_COLUMNS for name in columns):
            raise UserError(f"{path}: has images and no text, so there is nothing to learn: add questions or captions")
        reason = "no format has such columns; `columns` of a recipe maps other names"
        reason = reason if found is None else f"{found.source.format} comes nearest"
        if found is not None:
            _look_at_all(found, rows, say, samples=0)
        raise UserError(f"{path}: its rows are in no known format ({reason}); finetune/data/README.md has all of them")
    _conclude(path, found, rows, say, samples)


def _read_export(path: Path, layout: Layout, say: Say, samples: int) -> bool:
    """Look at a file or folder as an export; False where it has plain rows and only looked like one.

    Raises:
        InputError: it is neither.
    """
    found, failed = None, None
    try:
        found = guess_export(path, layout)
    except InputError as error:
        failed = error
    if (found is None or not found.fit) and _has_rows(path):
        say("", f"but is none: {one_line(failed or 'none of its rows fit that')}")
        return False
    if found is None:
        assert failed is not None, "an export that is not guessed has an error"
        raise failed
    _conclude(path, found, None, say, samples)
    return True


def _has_rows(path: Path) -> bool:
    """Whether some rows of a file fit a format, without `annotations`."""
    try:
        rows = read_source(Source(path=str(path), format="messages"))
        places = list(range(min(len(rows), LOOKED_AT)))
        plain = guess(str(path), rows, list(_columns(rows, places)), places)
    except InputError:
        return False
    return plain is not None and plain.fit > 0


def _conclude(path: Path, found: Guess, rows: Rows | None, say: Say, samples: int) -> None:
    """Look at all rows and print them, and the section that reads them.

    Raises:
        UserError: some rows cannot be used.
    """
    say("format", f"{found.source.format}: {found.fit:,} of {found.looked_at:,} rows looked at fit")
    if found.images_root is not None:
        say("images", f"from {one_line(found.images_root)} (data.images_root)")
    bad = _look_at_all(found, rows, say, samples)
    say("recipe", "put this into a recipe:")
    # Without an indent, so that it can be pasted as it stands.
    print(terminal_text(f"\n{section(found)}"), flush=True)
    if bad:
        raise UserError(f"{path}: {bad:,} rows cannot be used: mend them, or leave them out (data.on_bad_row: skip)")


def section(found: Guess) -> str:
    """The `data` section of a recipe, as YAML."""
    source = found.source
    given: dict[str, Any] = {"path": source.path, "format": source.format}
    if source.columns:
        given["columns"] = dict(source.columns)
    if source.box_form is not None:
        given["box_form"] = source.box_form
    if source.prompt is not None:
        given["prompt"] = source.prompt
    if source.fields:
        given |= {"fields": list(source.fields), "reply": source.reply}
    given |= {key: value for key in FILE_KEYS if (value := getattr(source, key)) is not None}
    if source.annotations is not None:
        given["annotations"] = {"layout": source.annotations.layout}
        if source.annotations.questions:
            given["annotations"]["questions"] = dict(source.annotations.questions)
    data: dict[str, Any] = {"train": given}
    if found.images_root is not None:
        data["images_root"] = found.images_root
    if found.grounding:
        data["grounding"] = True
    text = write_yaml({"data": data})
    for other in found.also:
        text = text.replace(
            f"box_form: {source.box_form}", f"box_form: {source.box_form}  # or {other}: the rows fit both"
        )
    return text


def _columns(rows: Rows, places: list[int]) -> dict[str, None]:
    """The names of all columns that hold something, in their order."""
    columns: dict[str, None] = {}
    for place in places:
        for row in rows.scan(place, place + 1):
            if isinstance(row, Mapping):
                columns |= {str(name): None for name, value in row.items() if value is not None}
    return columns


def _cells_of_unknown_text(rows: Rows, places: list[int]) -> dict[str, str]:
    """The columns of a workbook with cells that no format reads, and one of these each."""
    cells: dict[str, str] = {}
    for place in places:
        for row in rows.scan(place, place + 1):
            for name, value in row.items() if isinstance(row, Mapping) else ():
                if isinstance(value, Mapping) and UNKNOWN_TEXT in value:
                    cells.setdefault(str(name), str(value[UNKNOWN_TEXT]))
    return cells


def _look_at_all(found: Guess, rows: Rows | None, say: Say, samples: int) -> int:
    """Print what is in all rows; returns how many cannot be used."""
    data = Samples([found.source], images_root=found.images_root, rows=None if rows is None else [rows])
    for note in data.notes:
        say("note", one_line(note))
    counts: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    problems: list[BadRow] = []
    shown: list[Sample] = []
    with RowProgress("checking data", len(data)) as progress:
        for given in data.scan(0, len(data)):
            progress.add(1)
            problem = given if isinstance(given, BadRow) else _problem(given, found.grounding)
            if problem is None:
                assert isinstance(given, Sample), "a bad row is a problem"
                counts.update(_contents(given))
                unread.update(given.unread)
                if len(shown) < samples:
                    shown.append(given)
            elif not problems or problems[-1].args != problem.args:
                problems.append(problem)
    say("samples", f"{counts['samples']:,} can be used, with {counts['images']:,} images")
    say("replies", f"{counts['trained']:,} trained, {counts['context']:,} marked as context")
    if unread:
        say("not read", one_line(name_counts(unread)))
    for sample in shown:
        say("row", one_line(sample.origin))
        for line in _turns(sample):
            say("", line)
    if problems:
        say("problems", f"{len(problems):,}")
        for kind, count in problem_kinds(problems)[:_SHOWN_KINDS]:
            say("", f"{count:,} x {one_line(kind)}")
        for problem in problems[:SHOWN_PROBLEMS]:
            say("", one_line(problem))
    return len({problem.origin for problem in problems})


def _problem(sample: Sample, grounding: bool) -> BadRow | None:
    try:
        problems, _ = find_problems(sample, grounding=grounding, markup_as_text=frozenset())
    except BadField as error:
        problems = [error]
    if not problems:
        return None
    problem = together(problems)
    return BadRow(sample.origin, problem.field, problem.reason)


def _contents(sample: Sample) -> dict[str, int]:
    replies = [message for message in sample.messages if message["role"] == "assistant"]
    trained = sum(map(is_trained, replies))
    images = sum(1 for _ in image_sources(sample.messages))
    return {"samples": 1, "images": images, "trained": trained, "context": len(replies) - trained}


def _turns(sample: Sample) -> Iterator[str]:
    for message in sample.messages:
        texts = [
            f"[{image_name(part['image'])}]" if part["type"] == "image" else part["text"]
            for part in content_parts(message)
        ]
        said = one_line("".join(texts))
        role = message["role"] + (" (context)" if message.get("train") is False else "")
        yield f"{role}: {said if len(said) <= _LONGEST_TEXT else said[:_LONGEST_TEXT] + '…'}"
