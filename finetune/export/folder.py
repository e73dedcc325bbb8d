"""The folder that an export writes; nothing heavy is imported here."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import Failed, InputError, UserError
from finetune.files.output_paths import refuse_unwritable_folder
from finetune.files.path_errors import path_errors

FORMATS = ("safetensors", "nf4", "qwen2", "gguf")


def default_folder(model: str, to: str) -> Path:
    """Beside a model's folder, `MODEL-FORMAT`; of a hub id in the working directory, without its owner."""
    folder = Path(model)
    with path_errors(model, "read", "Check the path"):
        exists = folder.exists()
    if exists:
        folder = folder.resolve()
        return folder.with_name(f"{folder.name}-{to}")
    return Path(f"{folder.name}-{to}")


def refuse_existing(folder: Path) -> None:
    """Raises:
    UserError: something is there already (an empty folder is fine), or nothing can be written there.
    """
    refuse_unwritable_folder(folder, "the export", "--out")
    with path_errors(folder, "read", "Give another folder with --out"):
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: give another folder with --out, or remove that one")


@contextmanager
def writing_errors(folder: Path) -> Iterator[None]:
    """A disk that is full or fails while `folder` is written is not a mistake in the input.

    Raises:
        Failed: in place of an OSError that is not about the user's input.
    """
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise Failed(f"{folder} could not be written: {error}. There is nothing under that name") from error
