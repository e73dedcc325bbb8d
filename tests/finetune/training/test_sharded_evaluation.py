"""Runs whose processes share the model by FSDP2 evaluate as one process does, with fewer rows than processes."""

import json
from pathlib import Path

import pytest
from forked_ranks import finetune_on
from recipes_for_tests import IMAGES, ROOT, finetune, write_recipe, write_rows

pytestmark = pytest.mark.slow

SHARED = ROOT / "tests" / "helpers" / "fsdp_on_cpu.py"
PROCESSES = 3
FULL = {"adapter": None, "freeze": {"vision": False, "resampler": False, "language": False}}


def write_questions(file: Path, count: int) -> Path:
    rows = [
        {"image": str(IMAGES[n]), "question": f"Number {n}? " * (1 + n), "answers": ["Answer"]} for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe_of(folder: Path, evaluated: str, **changes) -> Path:
    """A run of one step that evaluates before and after it, on two rows or one question."""
    folder.mkdir()
    if evaluated == "task":
        data = {"path": str(write_questions(folder / "questions.jsonl", 3)), "format": "vqa"}
        evaluate = {"data": [data], "task": "docvqa", "sample": 1, "predictions": 1}
    else:
        data = {"path": str(write_rows(folder / "rows.jsonl", 2, first=31)), "format": "messages"}
        evaluate = {"data": [data], "predictions": 2}
    settings = {"train__max_steps": 1, "train__learning_rate": 1e-6, "train__eval_strategy": "steps"}
    settings |= {"train__eval_steps": 1, "train__per_device_eval_batch_size": 1}
    settings |= {"evaluate": evaluate | {"max_new_tokens": 5}, **changes}
    return write_recipe(folder, **settings)


def sharded(recipe: Path) -> str:
    done = finetune_on(PROCESSES, recipe, "train.parallel=fsdp", program=SHARED, timeout=300)
    assert all(one.returncode == 0 for one in done), done
    return done[0].stdout


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


@pytest.mark.parametrize("evaluated", ["loss", "task"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_fewer_rows_than_processes(tmp_path, kind, evaluated):
    changes = {"adapter__dropout": 0.0} if kind == "lora" else FULL
    alone = recipe_of(tmp_path / "alone", evaluated, **changes, train__gradient_accumulation_steps=PROCESSES)
    together = recipe_of(tmp_path / "together", evaluated, **changes, train__gradient_accumulation_steps=1)
    finetune(alone)
    said = sharded(together)
    assert "train.parallel" not in said
    ours, theirs = ([one for one in lines(folder, "metrics.jsonl") if "eval_loss" in one] for folder in
                    (tmp_path / "together", tmp_path / "alone"))  # fmt: skip
    assert len(ours) == len(theirs) == 1
    assert ours[0]["eval_loss"] == pytest.approx(theirs[0]["eval_loss"], abs=1e-4)
    for key in ("eval_samples", "eval_supervised_tokens", "eval_long_samples", "eval_anls"):
        assert ours[0].get(key) == theirs[0].get(key)
    shown = [[(one["when"], one["prediction"]) for one in lines(folder, "predictions.jsonl")] for folder in
             (tmp_path / "together", tmp_path / "alone")]  # fmt: skip
    assert shown[0] == shown[1]
    assert len(shown[0]) == (2 if evaluated == "task" else 4)
