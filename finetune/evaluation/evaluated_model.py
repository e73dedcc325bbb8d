"""What an evaluation needs to know about a model before it is loaded: its fingerprint, its folder."""

import hashlib
from pathlib import Path
from typing import Any

from finetune.files.base_identity import identify
from finetune.files.path_errors import path_errors
from qwenvl.checkpoint.identity import BaseIdentity, identity_to_json
from qwenvl.loading import ModelSource

EVALUATIONS = "evaluations"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def default_folder(model: str, task: str) -> Path:
    """The folder of an evaluation's results: inside a run folder; for any other model, under `runs/evaluations`."""
    if (Path(model) / "run.json").is_file():
        return Path(model) / EVALUATIONS / task
    folder = Path(model)
    name = folder.resolve().name if folder.exists() else folder.name
    return Path("runs") / EVALUATIONS / f"{name}-{task}"


def model_fingerprint(source: ModelSource, bases: dict[Path, BaseIdentity]) -> dict[str, Any]:
    """The identity of the base (see `qwenvl.checkpoint.identity`) and a digest of the adapter's files (SHA-256).

    Args:
        bases: those of this evaluation that were read already, by their paths; the base is added to it.

    Raises:
        InputError: a file of the model cannot be read.
    """
    digest = None
    if source.adapter is not None:
        hashed = hashlib.sha256()
        for name in ADAPTER_FILES:
            file = Path(source.adapter) / name
            with path_errors(file, "read", "See that it can be read"):
                hashed.update(file.read_bytes() if file.is_file() else b"")
        digest = hashed.hexdigest()[:32]
    place = Path(source.base).resolve()
    if place not in bases:
        bases[place] = identify(source.base, page_cache=True)
    return {"base": identity_to_json(bases[place]), "adapter": digest}
