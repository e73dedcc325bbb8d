"""Finds GGUF files; nothing heavy is imported here."""

from pathlib import Path


def gguf_files(path: str | Path) -> list[Path]:
    """The GGUF files of a folder, in name order; none where it is no folder."""
    return sorted(Path(path).glob("*.gguf")) if Path(path).is_dir() else []
