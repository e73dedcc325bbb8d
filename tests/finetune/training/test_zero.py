"""Runs whose processes share the model by DeepSpeed's ZeRO, over gloo: what one process makes."""

import os
import random
import shutil
import signal
import subprocess
import time
from importlib.util import find_spec

import pytest
from recipes_for_tests import ROOT, finetune
from zero_runs import (
    FULL,
    KINDS,
    LORA,
    accumulate,
    command_of,
    folder_of_result,
    go_back,
    largest_difference,
    logged,
    recipe_of,
    result_of,
    train,
    weights_in,
)

from finetune.run.checkpoints import find_last_good

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the package deepspeed: pip install deepspeed"),
]

STAGES = ("zero2", "zero3")
# Two processes add up gradients in another order than one. With Adam a weight whose gradient is nearly zero may go the
# other way for that, by the learning rate a step (1e-3 in full, else 1e-2). The losses show that they compute alike.
CLOSE = {"full": 2e-4, "lora": 2e-5, "embeddings": 2e-3, "q-lora": 2e-5}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folders of finished runs by kind and way, made when first asked for; to be copied."""
    made = {}

    def run(kind, way):
        if (kind, way) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{way}")
            processes = 1 if way == "none" else 2
            train(recipe_of(folder, KINDS[kind], processes), processes, way)
            made[kind, way] = folder
        return made[kind, way]

    return run


@pytest.fixture
def copied(ran, tmp_path):
    """A copy of a finished run, with which others may go on."""

    def copy(kind, way):
        source = ran(kind, way)
        folder = shutil.copytree(source, tmp_path / "copy")
        for file in (folder / "recipe.yaml", folder / "run" / "run.json"):
            file.write_text(file.read_text().replace(str(source), str(folder)))
        return folder

    return copy


# Q-LoRA by zero3 is refused: see test_zero_config.
@pytest.mark.parametrize(
    ("kind", "way"), [(kind, way) for kind in KINDS for way in STAGES if (kind, way) != ("q-lora", "zero3")]
)
def test_two_processes_train_evaluate_and_save_what_one_does(ran, kind, way):
    one, two = ran(kind, "none"), ran(kind, way)
    mine, theirs = logged(two), logged(one)
    assert mine.keys() == theirs.keys()
    assert (6, "eval_loss") in mine
    for key, value in mine.items():
        assert value == pytest.approx(theirs[key], rel=1e-4), key
    assert largest_difference(result_of(two), result_of(one)) <= CLOSE[kind]
    files = [sorted(file.name for file in folder_of_result(folder).iterdir()) for folder in (one, two)]
    assert files[0] == files[1]


@pytest.mark.parametrize("way", STAGES)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_as_many_processes_go_on_to_the_same_result(ran, copied, kind, way):
    folder = copied(kind, way)
    go_back(folder, 2)
    assert "from step 2" in train(folder / "recipe.yaml", 2, way).stdout
    assert largest_difference(result_of(folder), result_of(ran(kind, way))) == 0
    assert logged(folder) == logged(ran(kind, way))


@pytest.mark.parametrize(("way", "processes", "other"), [("zero2", 3, "zero2"), ("zero3", 2, "ddp"), ("zero3", 1, "")])
def test_another_number_of_processes_or_another_way_is_refused(copied, way, processes, other):
    folder = copied("lora", way)
    go_back(folder, 2)
    accumulate(folder, 1)
    done = train(folder / "recipe.yaml", processes, other, check=False)
    assert done.returncode != 0
    assert f"was saved by 2 processes with train.parallel: {way}" in done.stderr
    assert "Traceback" not in done.stderr.partition("torch/distributed/")[0]


@pytest.mark.parametrize("way", STAGES)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_any_checkpoint_becomes_a_model(ran, tmp_path, kind, way):
    made = []
    for folder in (ran(kind, way), ran(kind, "none")):
        made.append(tmp_path / folder.name)
        finetune("merge", folder / "run", "--checkpoint", "step-4", "--to", made[-1])
    assert largest_difference(*map(weights_in, made)) <= CLOSE[kind]


@pytest.mark.parametrize("way", STAGES)
def test_the_best_checkpoint_is_the_result(tmp_path, way):
    """A weight decay that doubles the weights at each step makes the loss worse again."""
    changes = {"train__weight_decay": 300.0, "train__learning_rate": 1e-2, "train__lr_scheduler_type": "constant"}
    changes |= {"train__warmup_steps": 0, "train__load_best_model_at_end": True, "train__eval_steps": 2}
    train(recipe_of(tmp_path, LORA, 2, **changes), 2, way)
    losses = {step: value for (step, key), value in logged(tmp_path).items() if key == "eval_loss"}
    best = min(losses, key=losses.get)
    assert best < 6, "the test needs a loss that rises"
    stored = weights_in(tmp_path / "run" / "checkpoints" / f"step-{best}")
    assert largest_difference(result_of(tmp_path), stored) == 0


@pytest.mark.parametrize("way", STAGES)
def test_16_bits_have_float32_masters(tmp_path, way):
    """At this learning rate most updates are smaller than half of what 16 bits can hold."""
    changes = {"model__dtype": "bfloat16", "train__learning_rate": 1e-4, "train__warmup_steps": 0}
    ways = {"one": (1, "none"), "two": (2, way)}
    for name, (processes, how) in ways.items():
        train(recipe_of(tmp_path / name, FULL, processes, **changes), processes, how)
    one, two = (logged(tmp_path / name) for name in ways)
    for (step, key), value in two.items():
        if key in ("loss", "eval_loss"):
            assert value == pytest.approx(one[step, key], rel=0.02), step
    weights = [result_of(tmp_path / name) for name in ways]
    assert {value.dtype for value in weights[1].values()} == {value.dtype for value in weights[0].values()}
    assert largest_difference(*weights) < 2e-3


@pytest.mark.parametrize("way", STAGES)
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_it_goes_on_to_the_same_result(ran, tmp_path, way, seed):
    recipe = recipe_of(tmp_path, LORA, 2)
    draw = random.Random(seed)
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (2, 4):
        process = subprocess.Popen(
            command_of(recipe, 2, way),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=ROOT,
        )
        # Inside the save of one process or the other, between two steps, or in a collective.
        waited_for = f".step-{step}.partial-*" if draw.random() < 0.6 else f"step-{step}"
        while not list(checkpoints.glob(waited_for)) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        last = find_last_good(checkpoints)
        assert not last.damaged
        assert last.step >= step - 2
    train(recipe, 2, way)
    assert largest_difference(result_of(tmp_path), result_of(ran("lora", way))) == 0
    assert logged(tmp_path) == logged(ran("lora", way))


@pytest.mark.parametrize("way", STAGES)
def test_a_loss_that_is_not_finite_stops_all_processes(tmp_path, way):
    recipe = recipe_of(tmp_path, FULL, 2, train__learning_rate=1e30, train__max_grad_norm=0.0)
    done = train(recipe, 2, way, check=False)
    assert done.returncode != 0
    assert "the loss is nan" in done.stderr or "the loss is inf" in done.stderr


def test_where_accelerate_does_not_apply_it_it_is_refused(tmp_path):
    recipe = recipe_of(tmp_path, LORA, 2)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29719")
    done = finetune(recipe, "train.parallel=zero2", launcher=launcher, check=False)
    assert done.returncode != 0
    assert "train.parallel: zero2 is not applied by Accelerate" in done.stderr
    assert not (tmp_path / "run" / "run.json").exists()
