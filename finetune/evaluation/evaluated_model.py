"""What an evaluation needs to know about a model before it is loaded: its fingerprint, its folder."""

import hashlib
from pathlib import Path

from finetune.files.path_errors import path_errors
from qwenvl.checkpoint.fingerprint import weights_fingerprint
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


def model_fingerprint(source: ModelSource) -> dict[str, str | None]:
    """Digests of the base's weights (see `qwenvl.checkpoint.fingerprint`) and of the adapter's files (SHA-256).

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
    return {"base": weights_fingerprint(source.base), "adapter": digest}
