"""Fingerprints of weights by the files that they are in, so that a chat need not read 19 GB to know its base.

What trains, merges, exports or evaluates computes them anew each time and only writes here: a disk may give back other
bytes than were written to it, which no file's time of change tells.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import constants

COARSEST_TIME = 2.0
"""Seconds: the coarsest resolution of a file's time of change on a usual file system (FAT)."""


@dataclass(frozen=True)
class WeightsFingerprints:
    """Of the tensors of a checkpoint: of every value (`weights_fingerprint`), and `sampled_fingerprint`."""

    weights: str
    sampled: str


Stamp = tuple[str, int, int, int, int]
"""Of a file: its path, size, mtime and ctime in nanoseconds, and inode."""

# Of this process, where the folder cannot be written: nothing is hashed twice in one command.
_known: dict[tuple[Stamp, ...], WeightsFingerprints] = {}


def cache_folder() -> Path:
    """In the Hugging Face home (`HF_HOME`), beside the files of models."""
    return Path(constants.HF_HOME) / "qwenvl-fingerprints"


def stamp_files(files: Sequence[Path]) -> tuple[Stamp, ...] | None:
    """What is known of files without reading them; None where one was changed so lately that a change right after
    might not show in its time."""
    stamps, now = [], time.time()
    for file in files:
        path = file.resolve()
        try:
            info = path.stat()
        except OSError:  # reported when it is read
            return None
        if abs(now - max(info.st_mtime, info.st_ctime)) <= COARSEST_TIME:
            return None
        stamps.append((str(path), info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino))
    return tuple(stamps)


def find_fingerprints(stamps: tuple[Stamp, ...]) -> WeightsFingerprints | None:
    """The fingerprints of files that have not changed since they were read; None where these are not known."""
    if stamps in _known:
        return _known[stamps]
    try:
        noted = json.loads(_entry(stamps).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    match noted:
        case {"files": list(files), "weights": str(weights), "sampled": str(sampled)} if files == [*map(list, stamps)]:
            return WeightsFingerprints(weights, sampled)
    return None


def keep_fingerprints(stamps: tuple[Stamp, ...], found: WeightsFingerprints) -> None:
    """Keep the fingerprints of files; where the folder cannot be written, in this process only."""
    _known[stamps] = found
    entry = _entry(stamps)
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=entry.parent, suffix=".partial")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"files": stamps, **asdict(found)}, file)
            os.replace(partial, entry)  # noqa: PTH105 (a name that mkstemp gave)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise


def _entry(stamps: tuple[Stamp, ...]) -> Path:
    paths = "\n".join(stamp[0] for stamp in stamps)
    return cache_folder() / f"{hashlib.sha256(paths.encode(errors='surrogateescape')).hexdigest()[:32]}.json"
