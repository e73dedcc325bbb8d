"""A checkpoint that never learned anything says so wherever its numbers are read; any other is not called random."""

import json
import shutil

import pytest
from recipes_for_tests import IMAGES, TINY, write_recipe
from said import collect

from finetune.evaluation.evaluate import Evaluation, EvaluationSource, evaluate
from finetune.evaluation.tasks import custom_task
from finetune.recipe import load_recipe
from finetune.terminal import labelled
from finetune.training.train import train


@pytest.fixture
def trained(tmp_path):
    """A checkpoint whose configuration does not say that its weights are random."""
    folder = tmp_path / "trained"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("random_weights") is True
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_only_random_weights_are_noted_as_such(tmp_path, trained):
    """In the run, its report and an evaluation of it."""
    rows = [{"image": str(IMAGES[0]), "question": "What?", "answers": ["x"]}]
    (tmp_path / "asked.jsonl").write_text(json.dumps(rows[0]) + "\n")
    source = EvaluationSource(str(tmp_path / "asked.jsonl"))
    noted = {}
    for base in (TINY, trained):
        file = write_recipe(tmp_path / base.name, train__max_steps=1, model__path=str(base))
        said: list[str] = []
        run = train(load_recipe(file), say=collect(said))
        out = evaluate(
            Evaluation(str(run), custom_task("anls", max_new_tokens=2), (source,), images_root="/"),
            say=lambda label, text="", said=said: said.append(labelled(label, text)),
        )
        pages = (run / "report.html").read_text() + (out / "evaluation.html").read_text()
        notes = json.loads((run / "run.json").read_text())["notes"]
        notes += json.loads((out / "results.json").read_text())["notes"]
        noted[base.name] = (
            len(notes),
            sum(line.startswith("note ") for line in said),
            pages.count("weights are random"),
        )
    assert noted == {"tiny": (2, 2, 1), "trained": (0, 0, 0)}
