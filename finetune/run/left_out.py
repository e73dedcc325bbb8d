"""`left_out.jsonl`: the rows that a run does not train on, or not whole, each with its reason.

What the check of the data left out is written when the run begins. An image that cannot be decoded is met later, by a
loader worker, the vision cache or an evaluation: its sample is left out there and then, and a line is added. Such a
line has the sample's number, by which a resumed run knows that this row may have been mended since.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from finetune.errors import UserError
from finetune.files.path_errors import write_errors
from finetune.terminal import terminal_line

logger = logging.getLogger(__name__)

LEFT_OUT = "left_out.jsonl"
MENDED = "mended"
WARNED = 5  # samples that are also named on the terminal

Found = dict[tuple[str, int], tuple[str, str]]
"""(part of the data, number of the sample) -> origin and reason."""


class LeftOut:
    """What a process of a run has left out since the run began.

    Args:
        folder: of the run; None notes nothing on the disk.
        on_bad_row: "error" refuses the sample that is met, after noting it; "skip" goes on.
        resumes: the run goes on; what its earlier parts have left out counts too.

    Attributes:
        found: what was left out: once each, whatever the number of epochs.
    """

    def __init__(self, folder: Path | None, on_bad_row: Literal["error", "skip"], *, resumes: bool = False):
        self.file = None if folder is None else folder / LEFT_OUT
        self.on_bad_row = on_bad_row
        self.found: Found = {}
        if resumes and self.file is not None:
            self.found = {
                (part, sample): (entry["origin"], entry["reason"])
                for part, samples in read_left_out(self.file).items()
                for sample, entry in samples.items()
                if not entry.get(MENDED)
            }

    def meet(self, part: str, sample: int, origin: str, reason: str) -> None:
        """Note a sample that cannot be used.

        Args:
            part: of the data: "train", "eval", or "questions" for those of the evaluation's task.
            sample: its number.
            origin: its file and row.
            reason: a sentence that names the row.

        Raises:
            UserError: `on_bad_row` is "error".
        """
        if (part, sample) not in self.found:
            self.found[part, sample] = origin, reason
            self._append({(part, sample): (origin, reason)})
            if self.on_bad_row == "skip" and len(self.found) <= WARNED:
                more = "; the next ones are in left_out.jsonl only" if len(self.found) == WARNED else ""
                logger.warning("left out (on_bad_row: skip): %s%s", terminal_line(reason), more)
        if self.on_bad_row == "error":
            raise UserError(
                f"{reason}. Mend it or take the row out, and start the same run again: it goes on from its last "
                "checkpoint. Or leave such rows out with data.on_bad_row: skip"
            )

    def join(self, others: Iterable[Found]) -> None:
        """Take over what other processes have left out, and add the lines that are missing in the file.

        Processes of one machine have written theirs; those of machines without a shared disk have not.
        """
        for found in others:
            self.found |= found
        if self.file is None:
            return
        written = {(part, sample) for part, samples in read_left_out(self.file).items() for sample in samples}
        self._append({key: self.found[key] for key in sorted(self.found) if key not in written})

    def counts(self) -> dict[str, int]:
        """How many samples of each part were left out."""
        return dict(Counter(part for part, _ in sorted(self.found)))

    def _append(self, found: Found) -> None:
        if self.file is None or not found:
            return
        lines = [
            json.dumps({"origin": origin, "reason": reason, "data": part, "sample": sample}, ensure_ascii=False) + "\n"
            for (part, sample), (origin, reason) in found.items()
        ]
        # One write each, to the end: processes of a run share the file.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with write_errors(self.file):
            descriptor = os.open(self.file, flags, 0o644)
            try:
                for line in lines:
                    os.write(descriptor, line.encode(errors="backslashreplace"))
            finally:
                os.close(descriptor)


def describe_left_out(rows: Mapping[str, Any], met: Mapping[str, Any]) -> list[str]:
    """What a run did not train on or evaluate on, or not whole; nothing where that is nothing.

    Args:
        rows: of run.json, the counts of the check by part of the data.
        met: of run.json, `left_out`: samples of each part that could not be read later.
    """
    kinds = {"bad": "that cannot be used", "too_long": "too long", "shortened": "trained without their first turns"}
    said = []
    for name, counts in rows.items():
        for kind, what in kinds.items():
            count = counts.get(kind) if isinstance(counts, Mapping) else None
            if isinstance(count, int) and count:
                said.append(f"{count:,} of {name} {what}")
    for name, count in met.items():
        if isinstance(count, int) and count:
            said.append(f"{count:,} of {name} whose images or rows could not be read later")
    return said


def read_left_out(file: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Of each part of the data, the numbers of the samples that were left out while the run worked, and their entries.

    Lines of the check, and a half line of a killed process, have none.

    Raises:
        UserError: the file is there and cannot be read: a run that goes on would take left out samples for others.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return found
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): it lists what the run has left out") from error
    for line in content.split(b"\n"):
        try:
            entry = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        if (
            isinstance(entry, dict)
            and {"origin", "reason", "data"} <= entry.keys()
            and type(entry.get("sample")) is int
        ):
            found.setdefault(str(entry["data"]), {})[entry["sample"]] = entry
    return found


def lines_of_before(file: Path, mended: Mapping[str, Collection[int]]) -> list[str]:
    """The lines of what the earlier parts of a run have left out, for the list that a resumed run writes anew.

    Args:
        mended: numbers of samples that are others now. Their lines stay, with a mark: the next resume must know too
            that these rows may differ from what they were when the run began.
    """
    return [
        json.dumps({**entry, **({MENDED: True} if sample in mended.get(part, ()) else {})}, ensure_ascii=False) + "\n"
        for part, samples in read_left_out(file).items()
        for sample, entry in samples.items()
    ]
