"""Where an export goes; nothing heavy is imported here."""

from pathlib import Path

from finetune.errors import UserError

FORMATS = ("safetensors", "nf4", "qwen2")


def default_folder(model: str, to: str) -> Path:
    """Beside a model's folder, `MODEL-FORMAT`; of a hub id in the working directory, without its owner."""
    folder = Path(model)
    if folder.exists():
        folder = folder.resolve()
        return folder.with_name(f"{folder.name}-{to}")
    return Path(f"{folder.name}-{to}")


def refuse_existing(folder: Path):
    """Raises:
    UserError: something is there already; an empty folder is nothing.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    what = "is not empty" if folder.is_dir() else "is a file"
    raise UserError(f"{folder} {what}: give another folder with --out, or remove that one")
