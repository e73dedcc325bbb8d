"""The checkpoints between the phases, and the published one at the end."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from qwenvl import QwenVLForConditionalGeneration, load_model, load_processor

CARD = Path(__file__).with_name("card.md")


def put_together(start: Path, parts: Sequence[Path], image_size: int, to: Path) -> None:
    """Write a checkpoint with the tensors of all parts, for images of `image_size` x `image_size` pixels."""
    model = _load(start)
    state = {name: value for part in parts for name, value in torch.load(part).items()}
    model.load_state_dict(state)
    model.config.require_visual()["image_size"] = image_size
    _save(model, start, to)


def mix(before: Path, after: Path, share: float, to: Path) -> None:
    """Write a checkpoint whose weights are interpolated: `share` of `before` and the rest of `after`.

    This restores what a training forgot, and loses little of what it learned (arXiv 2109.01903).
    """
    model, earlier = _load(after), _load(before)
    state, former = model.state_dict(), earlier.state_dict()
    model.load_state_dict({name: value.lerp(former[name], share) for name, value in state.items()})
    _save(model, after, to)


def at_resolution(folder: Path, image_size: int, to: Path) -> None:
    """Write a checkpoint with the same weights for images of `image_size` pixels.

    The model interpolates its position embeddings to the size of the image.
    """
    model = _load(folder)
    model.config.require_visual()["image_size"] = image_size
    _save(model, folder, to)


def publish(folder: Path, to: Path, seconds: Mapping[str, float]) -> None:
    """Write the checkpoint in the published layout, in bfloat16, with its card and the seconds of each phase."""
    model = _load(folder, torch.bfloat16)
    _save(model, folder, to)
    config = json.loads((to / "config.json").read_text())
    config["architectures"] = ["QWenLMHeadModel"]  # the published name of the class
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(CARD, to / "README.md")
    (to / "seconds.json").write_text(json.dumps(dict(seconds), indent=2) + "\n")


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> QwenVLForConditionalGeneration:
    model = load_model(folder, dtype=dtype)
    assert isinstance(model, QwenVLForConditionalGeneration), "these checkpoints have no adapter"
    return model


def _save(model: QwenVLForConditionalGeneration, source: Path, to: Path) -> None:
    """Save a model with the tokenizer of `source`."""
    partial = to.with_name(to.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        shutil.copy(source / name, partial / name)
    load_processor(partial)  # fails if what was written cannot be read
    partial.rename(to)
