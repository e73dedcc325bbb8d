"""`metrics.jsonl`: one JSON object a line, written so that a killed process leaves at most a half last line."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from finetune.errors import UserError
from finetune.files.atomic_writes import write_text
from finetune.files.path_errors import path_errors, write_errors
from finetune.run.json_values import to_json, with_floats

logger = logging.getLogger(__name__)


def append_metrics(file: Path, record: dict[str, Any]) -> None:
    """Add a line, in one write.

    Every line is valid JSON for every reader: NaN and the infinities become the strings "NaN", "Infinity" and
    "-Infinity". `read_metrics` turns them back.

    Raises:
        PathError, DiskError: it cannot be written.
    """
    with write_errors(file), file.open("ab+", buffering=0) as opened:
        _cut_half_line(opened)
        opened.write((to_json(record) + "\n").encode())


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records; a half last line (a killed process) is left out and logged. Empty where there is no file.

    Raises:
        UserError: the file cannot be read, or another line is not a JSON object; gives its number.
    """
    return [record for _, record in _lines(file)]


def forget_metrics_after(file: Path, step: int) -> int:
    """Drop the records of later steps, which a run that resumes at `step` will write again; atomically. The one that
    ends a training is written again too.

    Returns:
        How many were dropped. Records without a `step` stay.
    """
    return _forget(file, lambda record: record.get("step", step) > step or "train_runtime" in record)


def forget_evaluation_of(file: Path, step: int) -> int:
    """Drop what an evaluation after `step` has logged, which will be evaluated again; atomically.

    Returns:
        How many records were dropped.
    """
    return _forget(file, lambda record: record.get("step") == step and any(key.startswith("eval_") for key in record))


def _forget(file: Path, is_dropped: Callable[[dict[str, Any]], bool]) -> int:
    lines = _lines(file)
    kept = [line for line, record in lines if not is_dropped(record)]
    if len(kept) < len(lines):
        write_text(file, "".join(kept))
    return len(lines) - len(kept)


def _lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    with path_errors(file, "read", "Restore it, or start a new run"):
        if not file.exists():
            return []
        content = file.read_bytes()
    # Split at \n only: str.splitlines also takes U+2028 and others, which JSON strings may hold.
    *lines, rest = content.split(b"\n")
    if rest:
        logger.warning("%s: left out its half last line (%d bytes)", file, len(rest))
    records: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode()
            record = json.loads(text)
            if not isinstance(record, dict):
                raise ValueError(f"{type(record).__name__} instead of an object")
        except (ValueError, RecursionError) as error:
            place = f"{file}, line {number}"
            raise UserError(f"{place}: not a JSON object ({error}): delete the line") from None
        records.append((text + "\n", with_floats(record)))
    return records


def _cut_half_line(file: IO[bytes]) -> None:
    """What a killed process began to write must not become the beginning of the next record."""
    size = file.seek(0, os.SEEK_END)
    end = size
    while end:
        begin = max(0, end - 4096)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        end = begin + newline + 1 if newline >= 0 else begin
        if newline >= 0:
            break
    if end < size:
        logger.warning("%s: removed its half last line (%d bytes)", file.name, size - end)
        file.truncate(end)
