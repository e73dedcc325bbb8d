"""`finetune_state.json` of a checkpoint: what this trainer needs to go on, beside `trainer_state.json`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.errors import UserError
from finetune.files.path_errors import path_errors
from finetune.run.checkpoints import step_of
from finetune.training.throughput import NOTHING, Amounts

NOTE = "finetune_state.json"

Owed = Literal["step", "epoch"]
"""What of a step was not done when its state was saved: its evaluation, or what comes at the end of its epoch."""


@dataclass(frozen=True)
class CheckpointNote:
    """What a checkpoint says of its step. The defaults are those of a checkpoint that has no note.

    Attributes:
        owed: what a resume has to do before the next step.
        passing: only the time asked for it: the next checkpoint takes its place.
        totals: what all processes had trained on since the run began.
        not_logged: supervised tokens among them that were not logged yet.
        losses: of each process, the sum of its losses since the last log.
        logged_step: the last log's.
    """

    owed: Owed | None = None
    passing: bool = False
    totals: Amounts = NOTHING
    not_logged: int = 0
    losses: tuple[float, ...] = ()
    logged_step: int | None = None

    def write(self, folder: Path) -> None:
        (folder / NOTE).write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_note(folder: str | Path) -> CheckpointNote:
    """The note of a checkpoint; the defaults where an older version wrote it.

    Raises:
        UserError: it cannot be read.
    """
    file = Path(folder) / NOTE
    with path_errors(file, "read", "Use another checkpoint, or copy it again"):
        if not file.is_file():
            return CheckpointNote()
        text = file.read_text()
    try:
        content: Mapping[str, Any] = json.loads(text)
        return CheckpointNote(
            **{**content, "totals": Amounts(**content["totals"]), "losses": tuple(content["losses"])},
        )
    except (ValueError, TypeError, KeyError) as error:
        remedy = "use another checkpoint, or copy it again"
        raise UserError(f"{file} is not as it was written ({error}): {remedy}") from None


def passing_checkpoints(checkpoints: Path) -> set[Path]:
    """Those that only the time asked for. One that cannot be read stays."""
    found = set()
    for path in checkpoints.iterdir():
        if step_of(path) is not None:
            try:
                if read_note(path).passing:
                    found.add(path)
            except UserError:
                continue
    return found
