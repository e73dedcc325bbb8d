"""The Python scripts that a user would copy run as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script, *arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "examples" / script, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_image_is_described_by_the_bundled_checkpoint(tmp_path):
    said = run("describe_image.py", cwd=tmp_path)  # from any folder
    assert "102 of them for the image" in said
    assert len(said.partition("answer    ")[2].strip()) > 20  # a page's text


@pytest.mark.slow
def test_training_is_started_from_python(tmp_path):
    for name in ("recipes", "examples"):  # the script's paths are those of the repository's root
        (tmp_path / name).symlink_to(ROOT / name)
    said = run("train_from_python.py", cwd=tmp_path)
    assert "from runs/python" in said
    assert (tmp_path / "runs" / "python" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_serving_is_measured(tmp_path):
    options = ("--clients", "3", "--pages", "1", "--rounds", "1", "--max-tokens", "8", "--option=--dtype=float32")
    said = run("benchmark_serving.py", *options, cwd=tmp_path)
    rows = [row.split("|")[1:4] for row in said.splitlines() if row.startswith("| ")][1:]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [
        ["one at a time", "16", "0"],
        ["3 at once", "12", "0"],
        ["spaced, 70% of the capacity", "12", "0"],
    ]
    assert "same asked alone: 24 of 24" in said
