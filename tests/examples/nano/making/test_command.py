"""The command that makes the nano from nothing, at a thousandth of its size: every phase of it."""

import json
import os
import re
import subprocess
import sys
import time

import psutil
import pytest
from recipes_for_tests import ROOT

from qwenvl import load_model, load_processor

# As the command itself, which has no settings, with fewer steps and pages.
SMALL = """
import sys
from dataclasses import replace
from examples.nano.making import __main__ as command, stage
from examples.nano.making.warm_start import processes

in_processes = command.run_stage

def run_stage(recipe, *changes):
    if "stage1" in recipe.name:
        return in_processes(recipe, *changes)
    # Starting the processes of each takes longer than all that they do.
    sys.argv[1:] = [str(recipe), *changes]
    return stage.main()

if __name__ == "__main__":
    command.run_stage = run_stage
    processes.VISION_STEPS = processes.LANGUAGE_STEPS = 3
    command.VOCABULARY_DOCUMENTS = 300
    command.COMPARISONS = 8
    command.DATA = {name: replace(plan, count=8) for name, plan in command.DATA.items()}
    sys.exit(command.main())
"""
STAGES = tuple(path.stem for path in sorted((ROOT / "recipes" / "nano").glob("*.yaml")))


def make(folder, to):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "small.py"), "--to", str(to)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.mark.slow
def test_it_makes_a_checkpoint_and_does_nothing_twice(tmp_path):
    (tmp_path / "small.py").write_text(SMALL)
    (tmp_path / "recipes" / "nano").mkdir(parents=True)
    for stage in STAGES:
        text = (ROOT / "recipes" / "nano" / f"{stage}.yaml").read_text()
        shorter, replaced = re.subn(r"max_steps: \d+", "max_steps: 2", text)
        assert replaced == 1
        (tmp_path / "recipes" / "nano" / f"{stage}.yaml").write_text(shorter)
    made = make(tmp_path, "made")
    assert made.returncode == 0, made.stdout + made.stderr
    checkpoint = tmp_path / "made"
    names = ("config.json", "generation_config.json", "qwen.tiktoken", "README.md")
    assert all((checkpoint / name).is_file() for name in names)
    load_model(str(checkpoint)), load_processor(str(checkpoint))
    seconds = json.loads((checkpoint / "seconds.json").read_text())
    assert {"start", "warm starts", *(stage.partition("_")[0] for stage in STAGES)} <= set(seconds)
    # What each stage trained, by its run: all parameters in the second, all but the tower in the third.
    work = tmp_path / "runs" / "nano"
    for stage, frozen in (("stage1", "language"), ("stage2", None), ("stage3", "vision")):
        parameters = json.loads((work / stage / "run.json").read_text())["parameters"]
        assert {name for name, count in parameters.items() if not count["trained"]} >= ({frozen} if frozen else set())
        assert frozen is not None or all(count["trained"] == count["total"] for count in parameters.values())
    again = make(tmp_path, "again")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count(" is there") == made.stdout.count(": begins") and ": begins" not in again.stdout
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    refused = make(tmp_path, "made")
    assert refused.returncode == 2 and "exists" in refused.stderr


ENDLESS = """
from pathlib import Path
from examples.nano.making import __main__ as command
from examples.nano.making.warm_start import processes, progress

progress.SECONDS = 0  # in the children too
if __name__ == "__main__":
    command.VOCABULARY_DOCUMENTS = 300
    processes.VISION_STEPS = processes.LANGUAGE_STEPS = 1_000_000
    command.make_start(Path("start"), seed=0)
    processes.warm_starts(*map(Path, ("start", "vision.pt", "language.pt", "warm")), seed=0)
"""


@pytest.mark.slow
def test_killing_the_command_ends_its_warm_starts(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as file:  # a pipe would break with its reader, and end them in any case
        command = [sys.executable, str(tmp_path / "endless.py")]
        running = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=file)
    while not {"vision", "language"} <= set(log.read_text().split()):  # both have made steps
        assert running.poll() is None
        time.sleep(0.2)
    processes = psutil.Process(running.pid).children(recursive=True)
    assert len(processes) >= 2
    running.kill()
    running.wait()
    _, left = psutil.wait_procs(processes, timeout=60)
    for process in left:
        process.kill()
    assert not left
