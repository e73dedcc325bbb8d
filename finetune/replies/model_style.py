"""How a model is asked, as far as its files say."""

from pathlib import Path

from finetune.replies.task_replies import Style
from qwenvl.loading import find_source
from qwenvl.model.generation import stored_generation_config


def stored_style(model: str) -> Style | None:
    """The style of a model: "chat" for a chat checkpoint and for everything trained here, which is trained in ChatML
    whatever its base; "base" for a base checkpoint. None where the generation config does not say.

    Raises:
        InputError: there is no such model, or its generation config is damaged.
    """
    source = find_source(model)
    if source.adapter is not None or is_run(model):
        return "chat"
    settings = stored_generation_config(source.base)
    match getattr(settings, "chat_format", None):
        case "chatml":
            return "chat"
        case "raw":
            return "base"
    return None


def is_run(model: str) -> bool:
    """Whether a path is a run folder."""
    return (Path(model) / "run.json").is_file()
