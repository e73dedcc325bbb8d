"""What is known of a model before it is loaded: how it is asked, what it is told by, where its results go."""

import hashlib
from pathlib import Path

from transformers import GenerationConfig

from finetune.errors import UserError
from finetune.replies.task_replies import Style
from qwenvl.checkpoint.fingerprint import weights_fingerprint
from qwenvl.loading import find_source

EVALUATIONS = "evaluations"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def style_of(model: str) -> Style:
    """How a model is asked: a base checkpoint in raw text; a chat model, and all that is trained here, in ChatML.

    Raises:
        UserError: a checkpoint whose generation config does not say.
        FileNotFoundError: there is no such model.
    """
    source = find_source(model)
    if source.adapter is not None or is_run(model):
        return "chat"
    try:
        chat_format = getattr(GenerationConfig.from_pretrained(source.base), "chat_format", None)
    except OSError:
        chat_format = None
    if chat_format not in ("chatml", "raw"):
        raise UserError(
            f"{model}: its generation config does not say whether it is a chat model (chat_format: chatml) or a base "
            "model (raw). Give --style chat or --style base"
        )
    return "chat" if chat_format == "chatml" else "base"


def is_run(model: str) -> bool:
    """Whether a path is a folder that a training wrote."""
    return (Path(model) / "run.json").is_file()


def default_folder(model: str, task: str) -> Path:
    """Beside a run's other results; of another model under `runs/evaluations`."""
    if is_run(model):
        return Path(model) / EVALUATIONS / task
    folder = Path(model)
    name = folder.resolve().name if folder.exists() else folder.name
    return Path("runs") / EVALUATIONS / f"{name}-{task}"


def model_fingerprint(model: str) -> dict[str, str | None]:
    """The base's weights by `qwenvl.checkpoint.fingerprint`, and the adapter's files by their SHA-256."""
    source = find_source(model)
    digest = None
    if source.adapter is not None:
        hashed = hashlib.sha256()
        for name in ADAPTER_FILES:
            file = Path(source.adapter) / name
            hashed.update(file.read_bytes() if file.is_file() else b"")
        digest = hashed.hexdigest()[:32]
    return {"base": weights_fingerprint(source.base), "adapter": digest}
