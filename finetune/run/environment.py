"""What a run ran on: versions, commit, host."""

import platform
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("qwenvl-finetune", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")


def describe_environment(device: str | None = None) -> dict[str, Any]:
    """Describe what a run ran on, for `run.json`; imports none of the packages.

    Args:
        device: its name, as torch reports it.

    Returns:
        `versions` (package -> version, None where it is not installed), `commit` of the repository around the working
        directory (with `-dirty` for uncommitted changes; None where there is none), `host`, `platform`, `device`.
    """
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    return {
        "versions": versions,
        "commit": _commit(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "device": device,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no repository, somebody else's, or no commit in it yet
        return None
    return done.stdout.strip() or None
