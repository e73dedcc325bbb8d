"""`metrics.jsonl`: one JSON object a line, written so that a killed process leaves at most a half last line."""

import json
import logging
import os
from pathlib import Path
from typing import IO

from finetune.files.atomic_writes import write_text
from finetune.run.json_values import to_json, with_floats

logger = logging.getLogger(__name__)


def append_metrics(file: Path, record: dict):
    """Add a line, in one write.

    Every line is valid JSON for every reader: NaN and the infinities become the strings "NaN", "Infinity" and
    "-Infinity". `read_metrics` turns them back.
    """
    with file.open("ab+", buffering=0) as opened:
        _cut_half_line(opened)
        opened.write((to_json(record) + "\n").encode())


def read_metrics(file: Path) -> list[dict]:
    """The records; a half last line (a killed process) is left out and logged. None where there is no file.

    Raises:
        ValueError: another line is not a JSON object; gives its number.
    """
    return [record for _, record in _lines(file)]


def forget_metrics_after(file: Path, step: int) -> int:
    """Drop the records of later steps, which a run that resumes at `step` will write again; atomically.

    Returns:
        How many were dropped. Records without a `step` stay.
    """
    lines = _lines(file)
    kept = [line for line, record in lines if record.get("step", step) <= step]
    if len(kept) < len(lines):
        write_text(file, "".join(kept))
    return len(lines) - len(kept)


def _lines(file: Path) -> list[tuple[str, dict]]:
    if not file.exists():
        return []
    # Split at \n only: str.splitlines also takes U+2028 and others, which JSON strings may hold.
    *lines, rest = file.read_bytes().split(b"\n")
    if rest:
        logger.warning("%s: left out its half last line (%d bytes)", file, len(rest))
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"{type(record).__name__} instead of an object")
        except ValueError as error:
            place = f"{file}, line {number}"
            raise ValueError(f"{place}: not a JSON object ({error}): delete the line") from None
        records.append((line.decode() + "\n", with_floats(record)))
    return records


def _cut_half_line(file: IO[bytes]):
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
