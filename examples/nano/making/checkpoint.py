"""Checkpoints between the phases, and the published one at the end."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from qwenvl import load_model, load_processor

CARD = Path(__file__).with_name("card.md")


def put_together(start: Path, parts: Sequence[Path], image_size: int, to: Path) -> None:
    """A checkpoint with the tensors of all parts, for images of `image_size` pixels."""
    model = load_model(str(start), dtype=torch.float32)
    state = {name: value for part in parts for name, value in torch.load(part).items()}
    model.load_state_dict(state)
    model.config.visual["image_size"] = image_size
    _save(model, start, to)


def mix(before: Path, after: Path, share: float, to: Path) -> None:
    """Weights between those of two checkpoints, `share` of the way back from `after` to `before`.

    What a training forgot comes back, and little of what it learned goes (arXiv 2109.01903).
    """
    model, earlier = (load_model(str(folder), dtype=torch.float32) for folder in (after, before))
    state, former = model.state_dict(), earlier.state_dict()
    model.load_state_dict({name: value.lerp(former[name], share) for name, value in state.items()})
    _save(model, after, to)


def at_resolution(folder: Path, image_size: int, to: Path) -> None:
    """The same weights for images of `image_size` pixels: positions are resized when an image is seen."""
    model = load_model(str(folder), dtype=torch.float32)
    model.config.visual["image_size"] = image_size
    _save(model, folder, to)


def publish(folder: Path, to: Path, seconds: Mapping[str, float]) -> None:
    """The checkpoint in the published layout, in bfloat16, with its card."""
    model = load_model(str(folder), dtype=torch.bfloat16)
    _save(model, folder, to)
    config = json.loads((to / "config.json").read_text())
    config["architectures"] = ["QWenLMHeadModel"]  # the published name of the class, which is called otherwise here
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(CARD, to / "README.md")
    (to / "seconds.json").write_text(json.dumps(dict(seconds), indent=2) + "\n")


def _save(model, source: Path, to: Path) -> None:
    partial = to.with_name(to.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        shutil.copy(source / name, partial / name)
    load_processor(str(partial))  # reads what was written, or says what is wrong with it
    partial.rename(to)
