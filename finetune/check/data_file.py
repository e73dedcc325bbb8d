"""`finetune check FILE`: what a data file or folder holds, without a recipe, and the section of one that reads it."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.check.data_guess import Guess, guess
from finetune.check.sample_preview import image_name, one_line
from finetune.data.message_parts import image_sources
from finetune.data.problems import find_problems, together
from finetune.data.row_progress import RowProgress
from finetune.data.sample import SHOWN_PROBLEMS, BadField, BadRow, Sample
from finetune.data.samples import Samples
from finetune.data.sources.rows import Rows
from finetune.data.sources.sources import read_source
from finetune.data.summary import name_counts, problem_kinds
from finetune.errors import UserError
from finetune.recipe.sections import Source
from finetune.recipe.yaml_file import write_yaml
from finetune.terminal import Say, say, terminal_text
from qwenvl.text.chat import is_trained

LOOKED_AT = 100
"""Rows by which the format is guessed, from all parts of the data."""
_SHOWN_KINDS = 10
_LONGEST_TEXT = 300  # characters of a shown turn


def check_data(path: Path, *, samples: int = 3, say: Say = say) -> None:
    """Look at all rows of a data file and print what is in them, and the `data` section that reads them.

    Lengths need a model's tokenizer, so only a check of a recipe knows them.

    Args:
        path: file or folder.
        samples: rows to show.
        say: prints a line.

    Raises:
        InputError: the data cannot be opened.
        UserError: no format reads its rows, or some rows cannot be used; raised after everything was shown.
    """
    rows = read_source(Source(path=str(path), format="messages"))
    if not len(rows):
        raise UserError(f"{path}: holds no rows")
    step = max(1, len(rows) // LOOKED_AT)
    places = list(range(0, len(rows), step))[:LOOKED_AT]
    columns = _columns(rows, places)
    say("data", f"{one_line(path)}: {len(rows):,} rows")
    say("columns", one_line(", ".join(columns)[:1000]) or "none")
    found = guess(str(path), rows, list(columns), places)
    if found is None or not found.fit:
        reason = "no format has such columns" if found is None else f"{found.source.format} comes nearest"
        if found is not None:
            _look_at_all(found, rows, say, samples=0)
        raise UserError(f"{path}: its rows are in no known format ({reason}); finetune/data/README.md has all of them")
    say("format", f"{found.source.format}: {found.fit:,} of {len(places):,} rows looked at fit")
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
    text = write_yaml({"data": {"train": given} | ({"grounding": True} if found.grounding else {})})
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


def _look_at_all(found: Guess, rows: Rows, say: Say, samples: int) -> int:
    """Print what is in all rows; returns how many cannot be used."""
    data = Samples([found.source], rows=[rows])
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
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = [f"[{image_name(part['image'])}]" if part["type"] == "image" else part["text"] for part in parts]
        said = one_line("".join(texts))
        role = message["role"] + (" (context)" if message.get("train") is False else "")
        yield f"{role}: {said if len(said) <= _LONGEST_TEXT else said[:_LONGEST_TEXT] + '…'}"
