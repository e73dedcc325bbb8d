"""What an evaluation needs to know about a model before it is loaded: its style, its fingerprint, its folder."""

import hashlib
from pathlib import Path

from finetune.errors import UserError
from finetune.files.path_errors import path_errors
from finetune.replies.model_style import is_run, stored_style
from finetune.replies.task_replies import Style
from qwenvl.checkpoint.fingerprint import weights_fingerprint
from qwenvl.loading import find_source

EVALUATIONS = "evaluations"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def style_of(model: str) -> Style:
    """How a model is asked: a base checkpoint in raw text; a chat model, and all that is trained here, in ChatML.

    Raises:
        InputError: there is no such model, or its generation config does not say.
    """
    style = stored_style(model)
    if style is None:
        raise UserError(
            f"{model}: its generation config does not say whether it is a chat model (chat_format: chatml) or a base "
            "model (raw). Give --style chat or --style base"
        )
    return style


def default_folder(model: str, task: str) -> Path:
    """The folder of an evaluation's results: inside a run folder; for any other model, under `runs/evaluations`."""
    if is_run(model):
        return Path(model) / EVALUATIONS / task
    folder = Path(model)
    name = folder.resolve().name if folder.exists() else folder.name
    return Path("runs") / EVALUATIONS / f"{name}-{task}"


def model_fingerprint(model: str) -> dict[str, str | None]:
    """Digests of the base's weights (see `qwenvl.checkpoint.fingerprint`) and of the adapter's files (SHA-256).

    Raises:
        InputError: there is no such model, or a file of it cannot be read.
    """
    source = find_source(model)
    digest = None
    if source.adapter is not None:
        hashed = hashlib.sha256()
        for name in ADAPTER_FILES:
            file = Path(source.adapter) / name
            with path_errors(file, "read", "See that it can be read"):
                hashed.update(file.read_bytes() if file.is_file() else b"")
        digest = hashed.hexdigest()[:32]
    return {"base": weights_fingerprint(source.base), "adapter": digest}
