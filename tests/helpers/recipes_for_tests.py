"""A small run for tests: the tiny checkpoint, a few conversations, a few steps."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import yaml
from forked_finetune import run_forked

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "examples" / "tiny"
IMAGES = sorted((ROOT / "tests" / "data" / "tiny" / "images").glob("*.png"))

LORA = SimpleNamespace(
    r=4,
    alpha=8,
    dropout=0.0,
    rank_pattern={},
    alpha_pattern={},
    targets=["c_attn", "attn.c_proj", "w1", "w2"],
    vision_targets=["in_proj"],
    layers_to_transform=None,
    bias="none",
    rslora=False,
    dora=False,
    init="default",
)
"""Settings of an adapter, as a recipe has them."""


def write_rows(file: Path, count: int, first: int = 0) -> Path:
    """Conversations of different lengths with none, one or two images, in the messages format."""
    lines = []
    for row in range(first, first + count):
        images = [str(IMAGES[(row + n) % len(IMAGES)]) for n in range(row % 3)]
        question, answer = f"Question {row} " + "and more " * (row % 5), "Answer " * (row % 4 + 1)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages, "images": images}))
    file.write_text("\n".join(lines) + "\n")
    return file


def write_recipe(folder: Path, **changes) -> Path:
    """A recipe in `folder`; `changes` are `section__key=value`, or whole sections."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", 14)
    write_rows(folder / "eval.jsonl", 4, first=20)
    recipe = {
        "model": {"path": str(TINY), "dtype": "float32"},
        "adapter": {"r": 4, "dropout": 0.1},
        "data": {
            "train": [{"path": str(folder / "train.jsonl"), "format": "messages"}],
            "images_root": str(ROOT),
            "workers": 0,
        },
        "train": {
            "max_steps": 8,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 2,
            "gradient_checkpointing": False,
        },
        "output": str(folder / "run"),
        "seed": 3,
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            recipe.setdefault(section, {})[name] = value
        else:
            recipe[section] = value
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def finetune(
    *arguments: str | Path, launcher: tuple[str, ...] = (), check: bool = True, timeout: float = 300, **kwargs
):
    """Run the real command in a process of its own, or in those that a launcher starts."""
    words = [*map(str, arguments)]
    if launcher:
        command = [sys.executable, *launcher, "-m", "finetune", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **kwargs)
    else:
        done = run_forked(words, timeout, **kwargs)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def scored_questions(folder: Path, count: int) -> dict:
    """An `evaluate` section that scores short replies to questions on images, which it writes into the folder."""
    questions = [{"image": str(IMAGES[n]), "question": f"Number {n}?", "answers": ["a"]} for n in range(count)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return {
        "data": [{"path": str(folder / "questions.jsonl"), "format": "vqa"}],
        "task": "docvqa",
        "predictions": 0,
        "max_new_tokens": 4,
    }
