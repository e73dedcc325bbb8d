"""The examples of finetune/data/README.md: their files, their sources, and what the page says that they become."""

import re
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

PAGE = (Path(__file__).parents[2] / "finetune" / "data" / "README.md").read_text()
SECTIONS: dict[str, str] = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))
LOCAL = [name for name in SECTIONS if name not in ("Hub", "Excel", "Encodings")]
"""The sections with examples that need no network."""

_BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TURN = re.compile(r"(?:^| / )(user|assistant): (.*?)(?= / (?:user|assistant): |$)")


def write_page_images(folder: Path) -> None:
    """The images that the examples name, in `folder`/data."""
    (folder / "data" / "scans").mkdir(parents=True, exist_ok=True)
    for name in ("receipt.png", "photo.jpg", "scans/1.png", "scans/2.png"):
        Image.new("RGB", (640, 480), "teal").save(folder / "data" / name)


def write_section(section: str) -> list[dict[str, Any]]:
    """The sources of a section, as in the recipe, after its files were written and its Python was run here."""
    sources = []
    for language, name, text in _BLOCK.findall(SECTIONS[section]):
        if language == "yaml":
            given = yaml.safe_load(text)["data"]["train"]
            sources += given if isinstance(given, list) else [given]
        elif language == "python":
            exec(compile(text, section, "exec"), {})
        else:
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_text(text)
    return sources


def told_samples(section: str) -> list[str]:
    """What the page shows of each sample: `user: [image] What? / assistant: This.`"""
    return re.findall(r"^\s*-> (.+)$", SECTIONS[section], re.MULTILINE)


def told_replies(section: str) -> list[list[str]]:
    """The assistant's turns of each sample that the page shows."""
    return [[text for role, text in _TURN.findall(line) if role == "assistant"] for line in told_samples(section)]
