"""The files of a run folder."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.run.folder import RunFolder

ROOT = Path(__file__).parents[3]


def test_names(tmp_path):
    run = RunFolder(str(tmp_path))
    files = (run.recipe_file, run.run_file, run.metrics_file, run.checkpoints, run.adapter, run.report_file)
    assert [path.relative_to(tmp_path).as_posix() for path in (*files, run.lock_file)] == [
        *("recipe.yaml", "run.json", "metrics.jsonl", "checkpoints", "adapter", "report.html", "run.lock")
    ]


def test_run_json(tmp_path):
    run = RunFolder(tmp_path / "new" / "run")
    assert run.read_run() is None
    run.write_run({"status": "running", "base": "通义千问", "best": -math.inf, "parts": (1, 2)})
    run.write_run({"status": "finished", "base": "通义千问", "best": -math.inf, "parts": (1, 2)})
    assert run.read_run() == {"status": "finished", "base": "通义千问", "best": -math.inf, "parts": [1, 2]}
    assert "通义千问" in run.run_file.read_text(encoding="utf-8")
    run.write_recipe("seed: 1\n")
    assert run.recipe_file.read_text() == "seed: 1\n"
    assert sorted(path.name for path in run.path.iterdir()) == ["recipe.yaml", "run.json"]


def test_a_value_that_is_not_json_leaves_the_old_file(run):
    run.write_run({"status": "running"})
    with pytest.raises(TypeError):
        run.write_run({"status": object()})
    assert run.read_run() == {"status": "running"}
    assert [path.name for path in run.path.iterdir()] == ["run.json"]


def test_a_damaged_run_json(run):
    run.run_file.write_text('{"status": "run')
    with pytest.raises(UserError, match=r"run\.json is not JSON"):
        run.read_run()


def test_importing_is_light():
    program = (
        "import sys, finetune.run.folder, finetune.run.checkpoints;"
        " print([n for n in ('torch', 'peft') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr
