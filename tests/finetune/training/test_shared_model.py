"""Runs whose processes share the model by FSDP2, over gloo: what one process makes, whole, and from any checkpoint."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked_ranks import finetune_on, free_port
from recipes_for_tests import ROOT, finetune, write_recipe
from safetensors.torch import load_file

from finetune.run.checkpoints import find_last_good, verify

SHARED = ROOT / "tests" / "helpers" / "fsdp_on_cpu.py"
FULL = {
    "adapter": None,
    "freeze": {"vision": False, "resampler": False, "language": False},
    "train__learning_rate": 1e-3,
}
LORA = {"adapter": {"r": 4, "dropout": 0.0, "vision_targets": ["in_proj"]}}
BFLOAT16 = {**FULL, "model__dtype": "bfloat16"}
WITH_EMBEDDINGS = {
    "adapter": {"r": 4, "dropout": 0.0, "train_embeddings": True},
    "freeze": {"resampler": False},  # which has a frozen part, the positions
}
IN_16_BITS = {"adapter": {"r": 4, "dropout": 0.0, "bias": "lora_only"}, "model__dtype": "bfloat16"}
SAMPLES = 12  # of a step, with 1, 2 and 3 processes


def recipe_of(folder, kind, processes, **changes):
    """Six steps of the same samples, whatever the number of processes."""
    settings = {"max_steps": 6, "save_steps": 2, "save_total_limit": 9, "gradient_accumulation_steps": 12 // processes}
    changes = {f"train__{key}": value for key, value in settings.items()} | kind | changes
    recipe = write_recipe(folder, **changes)
    rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join([*rows, *rows[:10]]))  # 24: two steps an epoch
    return recipe


def train(recipe, processes, way="fsdp"):
    """Train with a number of processes, by FSDP2 where there are several; what the main one said."""
    if processes == 1:
        return finetune(recipe).stdout
    done = finetune_on(processes, recipe, f"train.parallel={way}", program=SHARED, timeout=300)
    assert all(one.returncode == 0 for one in done), done
    return done[0].stdout


def result_of(folder):
    result = folder / "run" / "adapter"
    result = result if result.exists() else folder / "run" / "model"
    verify(result)
    return {name: one for file in result.glob("*.safetensors") for name, one in load_file(file).items()}


def logged(folder):
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line}


def go_back(folder, step):
    """The run as it was when it was killed after a step; any number of processes goes on with the same steps."""
    run = folder / "run"
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    for result in ("adapter", "model"):
        shutil.rmtree(run / result, ignore_errors=True)
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.replace('"status": "finished"', '"status": "running"'))


def assert_same(folder, other, *, atol=0.0):
    mine, theirs = result_of(folder), result_of(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype
        assert (value.float() - theirs[name].float()).abs().max().item() <= atol, name


def assert_same_steps(folder, other, *, rel=1e-4):
    mine, theirs = logged(folder), logged(other)
    assert mine.keys() == theirs.keys()
    for step, figures in mine.items():
        assert figures == pytest.approx(theirs[step], rel=rel), step


# Two processes add up gradients in another order than one. With Adam a weight whose gradient is nearly zero may go the
# other way for that, by the learning rate a step; the losses show that they compute the same. The bias of the
# resampler's keys has no gradient but rounding.
CLOSE = {"full": 2e-4, "lora": 2e-5, "embeddings": 4e-4}
# In 16 bits, packs of other sequences are rounded in other places.
CLOSE_IN_16_BITS, STEPS_IN_16_BITS = 2e-2, 2e-2
KINDS = {"full": FULL, "lora": LORA, "embeddings": WITH_EMBEDDINGS, "bfloat16": BFLOAT16, "16 bits": IN_16_BITS}


def test_two_processes_train_and_save_what_one_does(tmp_path):
    changes = {"train__max_steps": 2}
    train(recipe_of(tmp_path / "one", FULL, 1, **changes), 1)
    train(recipe_of(tmp_path / "two", FULL, 2, **changes), 2)
    assert_same_steps(tmp_path / "two", tmp_path / "one")
    assert_same(tmp_path / "two", tmp_path / "one", atol=CLOSE["full"])
    one, two = (tmp_path / name / "run" / "model" for name in ("one", "two"))
    assert sorted(file.name for file in two.iterdir()) == sorted(file.name for file in one.iterdir())
    assert json.loads((two / "config.json").read_text()) == json.loads((one / "config.json").read_text())


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folders of finished runs by kind and number of processes, made when first asked for; to be copied."""
    made = {}

    def run(kind, processes):
        if (kind, processes) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}{processes}")
            train(recipe_of(folder, KINDS[kind], processes), processes)
            made[kind, processes] = folder
        return made[kind, processes]

    return run


@pytest.fixture
def copied(ran, tmp_path):
    """A copy of a finished run, with which others may go on."""

    def copy(kind, processes):
        source = ran(kind, processes)
        folder = shutil.copytree(source, tmp_path / "copy")
        for file in (folder / "recipe.yaml", folder / "run" / "run.json"):
            file.write_text(file.read_text().replace(str(source), str(folder)))
        return folder

    return copy


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("kind", CLOSE)
def test_several_processes_train_what_one_does(ran, kind, processes):
    one, several = ran(kind, 1), ran(kind, processes)
    assert_same_steps(several, one)
    assert_same(several, one, atol=CLOSE[kind])


@pytest.mark.slow
def test_masters_in_float32_are_computed_in_16_bits_and_saved_so(ran):
    one, two = ran("bfloat16", 1), ran("bfloat16", 2)
    assert_same_steps(two, one, rel=STEPS_IN_16_BITS)
    assert_same(two, one, atol=CLOSE_IN_16_BITS)
    assert {str(value.dtype) for value in result_of(two).values()} == {"torch.bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_processes_go_on_bit_for_bit(ran, copied, kind):
    folder = copied(kind, 2)
    go_back(folder, 2)
    assert "from step 2" in train(folder / "recipe.yaml", 2)
    assert_same(folder, ran(kind, 2))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (2, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize("kind", CLOSE)
def test_another_number_of_processes_goes_on(ran, copied, kind, before, after):
    folder = copied(kind, before)
    go_back(folder, 6)
    train(folder / "recipe.yaml", after)
    assert_same(folder, ran(kind, before))  # nothing was left to train: read and written as it was
    go_back(folder, 2)
    train(folder / "recipe.yaml", after)
    assert_same_steps(folder, ran(kind, before))
    assert_same(folder, ran(kind, before), atol=CLOSE[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_shared_run_goes_on_as_ddp(ran, copied, kind):
    folder = copied(kind, 2)
    go_back(folder, 2)
    train(folder / "recipe.yaml", 2, way="ddp")
    assert_same_steps(folder, ran(kind, 2))
    assert_same(folder, ran(kind, 2), atol=CLOSE[kind])


def kill(agent, draw):
    """Kill all processes of a run and their launcher, or one of them alone: then the launcher ends the others."""
    workers = [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]
    killed = [draw.choice(workers)] if workers and draw.random() < 0.5 else [agent.pid, *workers]
    for pid in killed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    agent.wait()
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers):
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_killed_at_any_moment_it_goes_on_to_the_same_result(ran, tmp_path, kind, seed):
    recipe = recipe_of(tmp_path, KINDS[kind], 2)
    draw = random.Random(seed)
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (2, 4):
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(), SHARED]
        command = [sys.executable, *map(str, launcher), str(recipe), "train.parallel=fsdp"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        # Inside the save of one process or the other, between two steps, or in a collective.
        waited_for = f".step-{step}.partial-*" if draw.random() < 0.6 else f"step-{step}"
        while not list(checkpoints.glob(waited_for)) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        kill(process, draw)
        last = find_last_good(checkpoints)
        assert not last.damaged
        assert last.step >= step - 2
    train(recipe, 2)
    assert_same(tmp_path, ran(kind, 2))
    assert logged(tmp_path) == logged(ran(kind, 2))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all_processes(tmp_path):
    recipe = recipe_of(tmp_path, FULL, 2, train__learning_rate=1e30, train__max_grad_norm=0.0)
    for done in finetune_on(2, recipe, "train.parallel=fsdp", program=SHARED):
        assert done.returncode != 0
        assert "the loss is nan" in done.stderr or "the loss is inf" in done.stderr
        assert "finetune/training" not in done.stderr  # no traceback of ours


@pytest.mark.slow
def test_without_accelerates_plugin_it_is_refused_before_weights_load(tmp_path):
    """On this device Accelerate applies none, and says nothing."""
    recipe = recipe_of(tmp_path, LORA, 2)
    for done in finetune_on(2, recipe, "train.parallel=fsdp"):
        assert done.returncode == 2
        assert "train.parallel: fsdp is not applied by Accelerate" in done.stderr
    assert not (tmp_path / "run" / "run.json").exists()
