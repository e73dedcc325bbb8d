"""What a merged folder was made of: the same merge is not done twice, and nothing else is overwritten."""

import json
import os
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.files.atomic_writes import write_text
from finetune.files.byte_progress import byte_progress
from finetune.files.checkpoint_folder import read_json
from finetune.files.path_errors import path_errors
from finetune.files.tensor_files import file_hash
from finetune.merge.adapter_config import MERGE_FILE
from qwenvl.checkpoint.identity import differences, identity_from_json

FORMAT = 1


def write_merge(folder: Path, made_of: dict[str, Any], files: dict[str, str], facts: dict[str, Any]) -> None:
    """Write `merge.json`.

    Args:
        folder: of the merged checkpoint, with all of `files`.
        made_of: what decides the weights: the identity of the base, the adapter's fingerprint, and settings; no paths.
        files: SHA-256 by name.
        facts: further keys.
    """
    listed = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256} for name, sha256 in sorted(files.items())
    }
    content = {"format": FORMAT, "made_of": made_of, **facts, "files": listed}
    write_text(folder / MERGE_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_merge(folder: Path) -> dict[str, Any] | None:
    """What a folder says it was merged from; None where it is no merged folder.

    Raises:
        UserError: its `merge.json` cannot be read.
    """
    if not (folder / MERGE_FILE).is_file():
        return None
    try:
        return read_json(folder / MERGE_FILE)
    except UserError as error:
        raise UserError(f"{error}, or remove the folder and merge again") from None


def is_done(to: Path, made_of: dict[str, Any], *, overwrite: bool, sources: list[Path]) -> bool:
    """Whether the same merge is at `to` already, complete.

    Args:
        to: the folder that is to be written.
        made_of: see `write_merge`.
        overwrite: whether anything else that is there may be replaced.
        sources: folders that are read, which must never be replaced.

    Raises:
        UserError: something else is there.
    """
    for source in sources:
        if to.resolve() in (source.resolve(), *source.resolve().parents) and to.exists():
            raise UserError(f"--to {to} is or contains {source}, which is read: give another folder")
    if not os.path.lexists(to) or (to.is_dir() and not any(to.iterdir())):
        return False
    there = read_merge(to)
    if there is None:
        reason = "is not empty"
    elif changes := _other_sources(there.get("made_of"), made_of, to / MERGE_FILE):
        reason = f"holds another merge ({'; '.join(changes)})"
    elif changed := _changed_files(to, there.get("files")):
        reason = f"holds this merge, but {', '.join(changed)} is missing or was changed"
    else:
        return True
    if not overwrite:
        raise UserError(f"--to {to} {reason}: give another folder, or --overwrite to replace it")
    return False


def _other_sources(there: Any, now: dict[str, Any], file: Path) -> list[str]:
    """In what a merge that is there was made of something else than this one."""
    if not isinstance(there, dict) or there.keys() != now.keys():
        return [f"{file.name} does not say of what"]
    bases = [identity_from_json(made_of["base"], file) for made_of in (there, now)]
    changes = [f"base: {change}" for change in differences(*bases)]
    others = [key for key in now if key != "base" and there[key] != now[key]]
    return changes + [f"{key} was {there[key]}, is {now[key]}" for key in others]


def _changed_files(folder: Path, listed: Any) -> list[str]:
    """The files that are missing or hold something else than listed; `merge.json` itself where it lists none."""
    if not isinstance(listed, dict) or not all(isinstance(file, dict) for file in listed.values()):
        return [MERGE_FILE]
    changed = {name for name, file in listed.items() if _size(folder / name) != file.get("bytes")}
    if not changed:
        total = sum(file["bytes"] for file in listed.values())
        with byte_progress("hashing what is there", total) as progress, path_errors(folder, "read", "Merge again"):
            hashes = {name: file_hash(folder / name, progress) for name in listed}
        changed = {name for name, file in listed.items() if hashes[name] != file.get("sha256")}
    return sorted(changed)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
