"""Runs that are killed, stopped, damaged or changed: what goes on, goes on bit for bit."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from changed_bases import edit_json, flip_a_bit
from forked_finetune import Started
from recipes_for_tests import TINY, finetune, write_recipe, write_rows

# Of a run's folder: what training computes, not when or how fast.
ADAPTER = ("adapter", "adapter_model.safetensors")


def adapter_bytes(run) -> bytes:
    return run.joinpath(*ADAPTER).read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A finished run of the recipe that the tests below interrupt: dropout on, accumulation 4, several epochs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    finetune(write_recipe(folder))
    return folder


def fresh(uninterrupted, tmp_path):
    """The same recipe and data with another output."""
    shutil.copy(uninterrupted / "recipe.yaml", tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml", tmp_path / "run", f"output={tmp_path / 'run'}"


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None or condition(), process.communicate()
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def steps_logged(run) -> int:
    """The last step with a loss in the metrics; a line may be half written just now."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return max((record["step"] for record in map(json.loads, lines) if "loss" in record), default=0)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_kill_at_a_random_moment(uninterrupted, tmp_path, seed):
    """kill -9 twice, anywhere after training began; then the same command finishes with the same adapter."""
    recipe, run, output = fresh(uninterrupted, tmp_path)
    generator = random.Random(seed)
    for _ in range(2):
        process = Started([recipe, output])
        already, more = steps_logged(run), generator.randint(1, 3)
        wait_for(
            lambda a=already, m=more: steps_logged(run) >= min(a + m, 7) or run.joinpath(*ADAPTER).exists(), process
        )
        time.sleep(generator.random() * 0.2)
        process.kill()
        process.wait()
    finetune(recipe, output)
    assert adapter_bytes(run) == adapter_bytes(uninterrupted / "run")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == sorted(set(steps)), "no step is logged twice"
    facts, whole = (json.loads((folder / "run.json").read_text()) for folder in (run, uninterrupted / "run"))
    assert facts["trained_on"] == whole["trained_on"], "what was done twice counts once"
    times = re.findall(r"^(\S+) resume +from step", (run / "log.txt").read_text(), re.MULTILINE)
    assert len(times) >= facts["parts"] - 1


def assert_saved_at_the_last_step(run):
    saved = max(int(path.name.split("-")[1]) for path in run.joinpath("checkpoints").iterdir())
    assert saved == steps_logged(run) < 8


@pytest.mark.parametrize(
    ("number", "code", "workers"),
    [
        (signal.SIGTERM, 143, 2),
        (signal.SIGINT, 130, 0),
        pytest.param(signal.SIGTERM, 143, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_leaves(uninterrupted, tmp_path, number, code, workers):
    """It reaches the loader's workers too, as Ctrl-C does and as schedulers do; the step still gets its batches."""
    recipe, run, output = fresh(uninterrupted, tmp_path)
    settings = output, "train.save_steps=500", f"data.workers={workers}"
    process = Started([recipe, *settings], start_new_session=True)  # a process group of its own, as in a terminal
    wait_for(lambda: steps_logged(run) >= 3, process)
    os.killpg(process.pid, number)
    assert process.wait(timeout=120) == code, process.communicate()
    assert "the same command goes on" in process.communicate()[1]
    assert_saved_at_the_last_step(run)
    finetune(recipe, *settings)
    assert adapter_bytes(run) == adapter_bytes(uninterrupted / "run")


def test_a_stopped_launcher_waits_for_what_is_saved(uninterrupted, tmp_path):
    """torchrun signals the process group of each of its processes, loader workers with them."""
    recipe, run, output = fresh(uninterrupted, tmp_path)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
        "-m",
        "finetune",
    ]
    command = [*torchrun, str(recipe), output, "train.save_steps=500", "data.workers=2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: steps_logged(run) >= 3, process)
    process.terminate()
    text, _ = process.communicate(timeout=120)
    assert "the same command goes on" in text
    assert_saved_at_the_last_step(run)


def test_a_damaged_checkpoint_is_passed_over(uninterrupted, tmp_path):
    recipe, run, output = fresh(uninterrupted, tmp_path)
    process = Started([recipe, output])
    wait_for(lambda: (run / "checkpoints" / "step-4").exists(), process)
    process.kill()
    process.wait()
    last = max((run / "checkpoints").iterdir(), key=lambda folder: int(folder.name.split("-")[1]))
    file = last / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = finetune(recipe, output)
    assert f"{last.name} is damaged" in done.stdout and "optimizer.pt" in done.stdout
    assert adapter_bytes(run) == adapter_bytes(uninterrupted / "run")


def interrupted_run(uninterrupted, tmp_path):
    recipe, run, output = fresh(uninterrupted, tmp_path)
    process = Started([recipe, output])
    wait_for(lambda: (run / "checkpoints" / "step-2").exists(), process)
    process.kill()
    process.wait()
    return recipe, run, output


def test_another_recipe_is_refused_with_the_difference(uninterrupted, tmp_path):
    recipe, run, output = interrupted_run(uninterrupted, tmp_path)
    # Hidden names are of what was being written when it was killed; any start clears them away.
    shown = [file for file in run.rglob("*") if not any(part[0] == "." for part in file.relative_to(run).parts)]
    before = {file: file.read_bytes() for file in shown if file.is_file() and file.name != "run.lock"}
    done = finetune(recipe, output, "train.learning_rate=1e-3", "adapter.r=8", check=False)
    assert done.returncode == 2
    assert "train.learning_rate: 0.01 -> 0.001" in done.stderr and "adapter.r: 4 -> 8" in done.stderr
    assert before == {file: file.read_bytes() for file in before}
    finetune(recipe, output, "train.logging_steps=2")
    assert adapter_bytes(run) == adapter_bytes(uninterrupted / "run")


def test_other_data_is_refused(tmp_path):
    folder = tmp_path / "own"
    recipe = write_recipe(folder)
    process = Started([recipe])
    wait_for(lambda: (folder / "run" / "checkpoints" / "step-2").exists(), process)
    process.kill()
    process.wait()
    write_rows(folder / "train.jsonl", 14, first=1)
    done = finetune(recipe, check=False)
    assert done.returncode == 2 and "data.train" in done.stderr


def test_another_base_is_refused(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    recipe = write_recipe(tmp_path / "own", model={"path": str(base), "dtype": "float32"})
    process = Started([recipe])
    wait_for(lambda: (tmp_path / "own" / "run" / "checkpoints" / "step-2").exists(), process)
    process.kill()
    process.wait()
    config = (base / "config.json").read_text()
    for changes, told in (
        ({"visual": {"image_size": 140}}, "config.json: visual.image_size was 112, is 140"),
        ({"seq_length": 300}, "config.json: seq_length was 700, is 300"),
    ):
        edit_json(base / "config.json", **changes)
        done = finetune(recipe, check=False)
        assert done.returncode == 2 and f"base: {told}" in done.stderr
        (base / "config.json").write_text(config)
    flip_a_bit(base / "model.safetensors")
    done = finetune(recipe, check=False)
    assert done.returncode == 2 and "base: other weights (fingerprint was " in done.stderr
    flip_a_bit(base / "model.safetensors")
    # A run from before knows some values of each tensor.
    run = json.loads((tmp_path / "own" / "run" / "run.json").read_text())
    run["identity"]["base"] = run["identity"]["base"]["sampled"]
    (tmp_path / "own" / "run" / "run.json").write_text(json.dumps(run))
    finetune(recipe)


def test_a_finished_run_is_left_alone(uninterrupted):
    before = adapter_bytes(uninterrupted / "run")
    done = finetune(uninterrupted / "recipe.yaml")
    assert "is finished" in done.stdout
    assert adapter_bytes(uninterrupted / "run") == before


def test_two_runs_on_one_folder(uninterrupted, tmp_path):
    recipe, run, output = fresh(uninterrupted, tmp_path)
    process = Started([recipe, output, "train.max_steps=100000", "train.save_steps=100000"])
    wait_for(lambda: steps_logged(run) >= 1, process)
    second = finetune(recipe, output, check=False)
    assert second.returncode == 2 and f"process {process.pid}" in second.stderr
    assert process.poll() is None
    process.kill()
    process.wait()
    # A killed holder holds nothing, whatever the lock file still says.
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    (run / "run.json").unlink()
    finetune(recipe, output)
    assert adapter_bytes(run) == adapter_bytes(uninterrupted / "run")


def test_no_connection_is_attempted(uninterrupted, tmp_path):
    """Training with the network cut off inside the process, hub and telemetry switches left at their defaults."""
    recipe, run, output = fresh(uninterrupted, tmp_path)
    script = (
        "import socket, sys\n"
        "def refuse(self, address):\n"
        "    raise SystemExit(f'a connection was attempted: {address}')\n"
        "socket.socket.connect = refuse\n"
        "from finetune.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "HF_HUB_OFFLINE")}
    command = [sys.executable, "-c", script, str(recipe), output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert adapter_bytes(run) == adapter_bytes(uninterrupted / "run")
