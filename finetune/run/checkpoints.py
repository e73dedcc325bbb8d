"""Checkpoints that are complete or absent, and whose damage is detected.

A checkpoint is a folder `checkpoints/step-N` with a `manifest.json`: every file's size and SHA-256. It is written
under a hidden name and renamed when all of it is on the disk (`atomic_writes`). Before a resume reads a checkpoint it
compares it with the manifest; a damaged one is reported, and the one before is used.
"""

import errno
import hashlib
import json
import re
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from finetune.errors import UserError

# `clean_partials` is a part of resuming: callers find it here.
from finetune.files.atomic_writes import clean_partials as clean_partials
from finetune.files.atomic_writes import moved_aside, remove, writing_folder

MANIFEST = "manifest.json"
FORMAT = 1
STEP_NAME = re.compile(r"step-(0|[1-9][0-9]*)")
HASHING_THREADS = 2
BLOCK = 4 << 20  # bytes read at a time while hashing


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was saved.

    Attributes:
        folder: the checkpoint.
        problems: one sentence for each file that is wrong.
    """

    def __init__(self, folder: Path, problems: list[str]):
        super().__init__(f"{folder} is damaged: {'; '.join(problems)}. Use another checkpoint, or copy it again")
        self.folder = folder
        self.problems = problems


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that is not damaged.

    Attributes:
        path: None where there is none. After a process was killed while it replaced a checkpoint this can be a hidden
            name, until `clean_partials` has moved it back.
        step: optimizer steps done; 0 where there is none.
        damaged: newer checkpoints that are damaged, newest first, each with the reason. To be shown to the user.
    """

    path: Path | None = None
    step: int = 0
    damaged: list[tuple[Path, str]] = field(default_factory=list)


def checkpoint_path(checkpoints: str | Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps belongs."""
    return Path(checkpoints) / f"step-{step}"


def step_of(path: str | Path) -> int | None:
    """The step in a checkpoint's name; None for a name that is not a checkpoint's."""
    match = STEP_NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else None


@contextmanager
def writing(final: str | Path) -> Iterator[Path]:
    """A fresh folder to fill, which becomes the checkpoint `final`, with a manifest, when the block ends.

        with writing(checkpoint_path(run.checkpoints, 20)) as partial:
            model.save_pretrained(partial)

    An exception in the block, or a full disk anywhere, removes the folder and changes nothing else. In a distributed
    run one process enters this and tells the others the folder; it leaves the block when all have written.

    Raises:
        OSError: the disk is full or fails (see `writing_folder`).
    """
    final = Path(final)
    with writing_folder(final) as partial:
        yield partial
        _write_manifest(partial, step_of(final))


def verify(folder: str | Path) -> dict:
    """Compare every byte of a checkpoint with its manifest (as fast as two threads hash, some 1 to 3 GB/s).

    A file that the manifest does not list is damage too, since a loader may prefer it to the one that was saved;
    hidden files are not, since no loader opens them and file managers and NFS leave some.

    Returns:
        The manifest: `format`, `step` (None for a folder not named `step-N`), `files` (relative name -> `size` in
        bytes, `sha256`), `checksum`.

    Raises:
        DamagedCheckpoint: names each file and what is wrong with it.
        OSError: it cannot be read for another reason than damage (permissions, a network that is away).
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    step = step_of(folder)
    if step is not None and step != manifest["step"]:
        raise DamagedCheckpoint(folder, [f"it is the checkpoint of step {manifest['step']} under another name"])
    files = manifest["files"]
    present = _file_names(folder)
    problems = [f"{name} is missing" for name in files if name not in present]
    problems += [f"{name} is not one of its files" for name in present if name not in files and not _is_hidden(name)]
    for name in files:
        if name in present and (size := (folder / name).stat().st_size) != files[name]["size"]:
            problems.append(f"{name} has {size:,} bytes instead of {files[name]['size']:,}")
    if not problems:
        # Each file is one task: a digest cannot be shared between threads.
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            found = pool.map(lambda name: _compare_digest(folder, name, files[name]["sha256"]), files)
            problems = [problem for problem in found if problem]
    if problems:
        raise DamagedCheckpoint(folder, problems)
    return manifest


def find_last_good(checkpoints: str | Path) -> Found:
    """The newest checkpoint, by step, that is what was saved. Changes nothing, so it needs no lock."""
    checkpoints = Path(checkpoints)
    if not checkpoints.is_dir():
        return Found()
    named = [(path, path) for path in checkpoints.iterdir()] + list(moved_aside(checkpoints))
    candidates = [(step, path) for final, path in named if (step := step_of(final)) is not None]
    damaged = []
    for step, path in sorted(candidates, reverse=True):
        try:
            verify(path)
        except DamagedCheckpoint as error:
            damaged.append((path, "; ".join(error.problems)))
        else:
            return Found(path, step, damaged)
    return Found(damaged=damaged)


def prune(
    checkpoints: str | Path,
    keep: int | None,
    also_keep: Collection[str | Path] = (),
    passing: Collection[str | Path] = (),
) -> list[Path]:
    """Remove the oldest checkpoints, leaving the `keep` newest, those in `also_keep` and the last good one.

    When there is something to remove, the newest is read and verified first: a damaged one must not cost the good one
    before it. Where none is good, nothing is removed.

    Args:
        keep: None keeps all.
        passing: are not counted, and go when a newer one is there; of those after the last that is counted the newest
            stays, and two where none is counted yet.

    Returns:
        The removed ones, oldest first.

    Raises:
        ValueError: `keep` below 1.
        OSError: one cannot be moved away; the rest is as it was.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep}: at least the last checkpoint has to stay")
    checkpoints = Path(checkpoints)
    steps = [(step, path) for path in checkpoints.iterdir() if (step := step_of(path)) is not None]
    by_step = [path for _, path in sorted(steps)]
    going = {Path(path).resolve() for path in passing}
    counted = [path for path in by_step if path.resolve() not in going]
    after = by_step[by_step.index(counted[-1]) + 1 :] if counted else by_step
    staying = {*(counted if keep is None else counted[-keep:]), *after[-1 if counted else -2 :]}
    kept = {Path(path).resolve() for path in also_keep}
    surplus = [path for path in by_step if path not in staying and path.resolve() not in kept]
    if not surplus:
        return []
    last_good = find_last_good(checkpoints).path
    if last_good is None:
        return []
    surplus = [path for path in surplus if path != last_good]
    for path in surplus:
        remove(path)
    return surplus


def _write_manifest(folder: Path, step: int | None) -> None:
    names = _file_names(folder)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        digests = list(pool.map(lambda name: _sha256(folder / name), names))
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests, strict=True)
    }
    text = _manifest_text({"format": FORMAT, "step": step, "files": files})
    (folder / MANIFEST).write_text(text, encoding="utf-8", newline="\n")


def _read_manifest(folder: Path) -> dict:
    if not (folder / MANIFEST).is_file():
        raise DamagedCheckpoint(folder, [f"{MANIFEST} is missing, so it cannot be verified"])
    try:
        text = (folder / MANIFEST).read_bytes().decode()
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(folder, [f"{MANIFEST} is not readable ({error})"]) from None
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise DamagedCheckpoint(folder, [f"{MANIFEST} is not readable ({error.strerror})"]) from None
    if not isinstance(manifest, dict) or not {"format", "step", "files", "checksum"} <= manifest.keys():
        raise DamagedCheckpoint(folder, [f"{MANIFEST} is not the manifest of a checkpoint"])
    if isinstance(manifest.get("format"), int) and manifest["format"] > FORMAT:
        raise DamagedCheckpoint(folder, [f"{MANIFEST} has format {manifest['format']} of a newer version: update"])
    # Byte for byte as it was written: a flip inside white space or a number must not pass either.
    if text != _manifest_text({key: value for key, value in manifest.items() if key != "checksum"}):
        raise DamagedCheckpoint(folder, [f"{MANIFEST} is not what was saved (its checksum differs)"])
    return manifest


def _manifest_text(content: dict) -> str:
    """The one spelling of a manifest; `checksum` is the SHA-256 of it without that entry."""
    checksum = hashlib.sha256(json.dumps(content, indent=2).encode()).hexdigest()
    return json.dumps(content | {"checksum": checksum}, indent=2) + "\n"


def _file_names(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return [name for name in names if name != MANIFEST]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _compare_digest(folder: Path, name: str, expected: str) -> str | None:
    try:
        found = _sha256(folder / name)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"{name} is not readable ({error.strerror})"
    if found != expected:
        return f"{name} is not what was saved (SHA-256 {found[:16]}... instead of {expected[:16]}...)"
    return None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    block = memoryview(bytearray(BLOCK))
    with file.open("rb", buffering=0) as opened:
        while size := opened.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()
