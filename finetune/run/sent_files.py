"""Files of the main process sent to processes that do not see its disk, through the launcher's key-value store."""

import time
from collections.abc import Sequence
from pathlib import Path

from finetune.run.meeting import Meeting

CHUNK = 8_000_000
"""Bytes of one value in the store."""

AHEAD = 4
"""Chunks in the store that not all receivers have taken."""

NAP = 0.01


def send_files(meeting: Meeting, name: str, folder: Path, files: Sequence[Path], receivers: int) -> None:
    """Send files; returns when all receivers have them.

    Args:
        name: of this sending, told once.
        folder: that the files are named relative to.
        receivers: how many processes call `receive_files`.

    Raises:
        BaseException: another process has failed.
    """
    meeting.tell(f"{name}/files", [(file.relative_to(folder).as_posix(), file.stat().st_size) for file in files])
    sent = 0
    for file in files:
        with file.open("rb") as opened:
            while content := opened.read(CHUNK):
                _wait_until_taken(meeting, name, sent - AHEAD, receivers)
                meeting.put_bytes(f"{name}/{sent}", content)
                sent += 1
    for chunk in range(max(sent - AHEAD, 0), sent):
        _wait_until_taken(meeting, name, chunk, receivers)


def receive_files(meeting: Meeting, name: str, folder: Path) -> None:
    """Write the files of the main process into a folder.

    Raises:
        BaseException: another process has failed.
    """
    chunk = 0
    for relative, size in meeting.hear(f"{name}/files"):
        file = folder / relative
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as opened:
            while opened.tell() < size:
                opened.write(meeting.wait_for_bytes(f"{name}/{chunk}"))
                meeting.count(f"{name}/{chunk}/taken")
                chunk += 1


def _wait_until_taken(meeting: Meeting, name: str, chunk: int, receivers: int) -> None:
    """Wait for all receivers to have a chunk, and drop it; a negative number is no chunk."""
    if chunk < 0:
        return
    while meeting.counted(f"{name}/{chunk}/taken") < receivers:
        meeting.raise_if_failed()
        time.sleep(NAP)
    meeting.drop(f"{name}/{chunk}")
