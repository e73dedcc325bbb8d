"""What an evaluation needs to know about a model before it is loaded: its style, its fingerprint, its folder."""

import hashlib
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.files.base_identity import identify
from finetune.files.path_errors import path_errors
from finetune.replies.model_style import is_run, stored_style
from finetune.replies.task_replies import Style
from qwenvl.checkpoint.identity import BaseIdentity, identity_to_json
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


def model_fingerprint(model: str, bases: dict[Path, BaseIdentity]) -> dict[str, Any]:
    """The identity of the base (see `qwenvl.checkpoint.identity`) and a digest of the adapter's files (SHA-256).

    Args:
        bases: those of this evaluation that were read already, by their paths; the base is added to it.

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
    place = Path(source.base).resolve()
    if place not in bases:
        bases[place] = identify(source.base, page_cache=True)
    return {"base": identity_to_json(bases[place]), "adapter": digest}
