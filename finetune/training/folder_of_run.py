"""The run folder that a process reads: the main process's own, or copies where it does not see that one.

Only the main process writes into the run folder, and what it finds there decides whether a run starts, goes on or is
finished. The machines of a run need not share a disk: a process that does not see the main one's folder gets what it
needs from it, and keeps it in a temporary folder.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist
from transformers import Trainer

from finetune.errors import UserError
from finetune.files.path_errors import write_errors
from finetune.quantities import format_bytes
from finetune.recipe import Recipe
from finetune.run.folder import RunFolder
from finetune.run.left_out import LEFT_OUT
from finetune.run.meeting import Meeting
from finetune.run.sent_files import receive_files, send_files
from finetune.terminal import Say
from finetune.training.going_on import ADAPTER_FROM
from finetune.training.parallel import Parallel
from finetune.training.start import Finished, Fresh, Resume, Start

LOOKS, NAP = 5, 0.3
"""How often, and with how many seconds between, a process looks for a file: network disks show it late."""


@dataclass(frozen=True)
class FolderOfRun:
    """The run folder of one process.

    Attributes:
        run: that it reads; of the main process, the one that is written.
        is_shared: whether all processes see the main one's.
        receivers: processes that get copies, one for each machine.
        meeting: of the processes; None where there is one.
    """

    run: RunFolder
    is_shared: bool = True
    receivers: tuple[int, ...] = ()
    meeting: Meeting | None = None

    def require_for(self, recipe: Recipe, parallel: Parallel) -> None:
        """Refuse checkpoints in parts, each of which its process writes and reads, where not all see the folder.

        Raises:
            UserError: with the remedy.
        """
        in_parts = parallel.way in ("zero2", "zero3") or (parallel.way == "fsdp" and recipe.adapter is None)
        if in_parts and not self.is_shared:
            raise UserError(
                f"output: by train.parallel: {parallel.way} each process saves its part of the state, and not all of "
                f"them see {recipe.output}: put output on a disk that all machines share"
            )

    def start_of_main(self, start: Start | None, say: Say) -> Start:
        """Where the run stands, as the main process has found; with the checkpoint where this process sees it.

        Args:
            start: of the main process; None in the others.
        """
        meeting = self.meeting
        if meeting is None:
            assert start is not None
            return start
        told = meeting.from_main("start", lambda: _start_to_json(start))
        # From here on the main process writes into its folder; all have read there what was.
        meeting.from_all("have read", value=True)
        if told["kind"] != "resume":
            return Finished() if told["kind"] == "finished" else Fresh()
        if start is None:
            start = Resume(self.run.checkpoints / told["checkpoint"], told["step"], tuple(told["extensions"]))
        assert isinstance(start, Resume)
        if not self.is_shared:
            self._hand_over(start.checkpoint, say)
        return start

    def _hand_over(self, checkpoint: Path, say: Say) -> None:
        """Send a checkpoint to each machine that does not see it."""
        meeting = self.meeting
        assert meeting is not None
        if meeting.is_main:
            files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file()]
            size = sum(file.stat().st_size for file in files)
            say("", f"sending {checkpoint.name} ({format_bytes(size)}) to machines without this folder")
            send_files(meeting, "checkpoint", checkpoint, files, len(self.receivers))
        elif meeting.process in self.receivers:
            receive_files(meeting, "checkpoint", checkpoint)
        meeting.from_all("checkpoint is there", value=True)


@contextmanager
def folder_of_run(run: RunFolder, meeting: Meeting | None, say: Say) -> Iterator[FolderOfRun]:
    """The run folder that this process reads, until the context ends.

    Args:
        run: as the recipe names it; the main process holds it.
    """
    if meeting is None:
        yield FolderOfRun(run)
        return
    sees = _sees_folder_of_main(run, meeting)
    machine = os.environ.get("GROUP_RANK") or socket.gethostname()
    told = meeting.from_all("sees", [sees, machine])
    without = [process for process, (has, _) in enumerate(told) if not has]
    first = {told[process][1]: process for process in reversed(without)}  # of each machine
    receivers = tuple(sorted(first.values()))
    if not without:
        yield FolderOfRun(run, meeting=meeting)
        return
    say("output", f"{run.path} is not on a disk that all {len(told)} processes share: {len(without)} get copies")
    with TemporaryDirectory(prefix="finetune-run-") as temporary:
        copy = run
        if meeting.is_main:
            files = [file for file in (run.run_file, run.rows_file, run.path / LEFT_OUT) if file.is_file()]
            send_files(meeting, "facts", run.path, files, len(receivers))
        elif meeting.process in receivers:
            copy = RunFolder(temporary)
            receive_files(meeting, "facts", copy.path)
            meeting.tell(f"copy/{machine}", temporary)
        elif not sees:
            copy = RunFolder(meeting.hear(f"copy/{machine}"))
        yield FolderOfRun(copy, is_shared=False, receivers=receivers, meeting=meeting)


def _sees_folder_of_main(run: RunFolder, meeting: Meeting) -> bool:
    """Whether this process finds a file that the main one has just written; a meeting of all processes."""
    name = meeting.from_main("token", lambda: f".seen-by-{secrets.token_hex(8)}")
    file = run.path / name
    if meeting.is_main:
        with write_errors(file):
            file.touch()
        meeting.tell("token is there", value=True)
    meeting.hear("token is there")
    try:
        for look in range(LOOKS):
            if file.exists():
                break
            time.sleep(NAP if look < LOOKS - 1 else 0)
        sees = file.exists()
        meeting.from_all("have looked", value=True)
    finally:
        if meeting.is_main:
            file.unlink(missing_ok=True)
    return sees


def require_the_same(meeting: Meeting | None, identity: Mapping[str, Any]) -> None:
    """Refuse data or a base that is not the main process's: on another machine a path may lead to something else.

    Args:
        identity: see `start.run_identity`; without the base in a process that has not looked at it.

    Raises:
        UserError: with what differs.
    """
    if meeting is None:
        return
    parts = {key: identity[key] for key in ("data", "base", ADAPTER_FROM) if key in identity}
    of_main = meeting.from_main("identity", lambda: parts)
    differing = [key for key, own in parts.items() if _as_json(own) != of_main[key]]
    if differing:
        raise UserError(
            f"{' and '.join(differing)}: not the same on all machines, though the recipe names it by the same path: "
            "copy it from the machine of the first process, or put it on a disk that all share"
        )


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def take_over_result(trainer: Trainer) -> None:
    """Give all processes the trained weights and the best step of the main one; a collective call.

    The result may be an earlier checkpoint, which Transformers loads where a process finds it.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.state
    box = [(state.best_global_step, state.best_model_checkpoint)]
    dist.broadcast_object_list(box)
    state.best_global_step, state.best_model_checkpoint = box[0]
    for parameter in model.parameters():
        if parameter.requires_grad:
            dist.broadcast(parameter.data, 0)


def _start_to_json(start: Start | None) -> dict[str, Any]:
    assert start is not None, "the main process looks"
    if isinstance(start, Resume):
        extensions = [dict(one) for one in start.extensions]
        return {"kind": "resume", "checkpoint": start.checkpoint.name, "step": start.step, "extensions": extensions}
    return {"kind": "finished" if isinstance(start, Finished) else "fresh"}
