import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from recipes_for_tests import finetune, write_recipe
from safetensors.torch import load_file

from finetune.errors import UserError
from finetune.run.checkpoints import checkpoint_path, find_last_good, writing
from finetune.run.folder import RunFolder
from finetune.training.extension import Extension, FollowLongerSchedule, extension_of, pending


def weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def rates(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    """A finished run of two epochs at a constant rate."""
    folder = tmp_path_factory.mktemp("extended")
    recipe = write_recipe(
        folder,
        train__max_steps=-1,
        train__num_train_epochs=2,
        train__gradient_accumulation_steps=7,  # 2 steps an epoch
        train__lr_scheduler_type="constant",
        train__load_best_model_at_end=True,
        evaluate={"data": [{"path": str(folder / "eval.jsonl"), "format": "messages"}], "predictions": 0},
    )
    finetune(recipe)
    return recipe


@pytest.fixture
def finished(two_epochs, tmp_path):
    """The run in a folder of its own; the arguments of its command."""
    shutil.copytree(two_epochs.parent / "run", tmp_path / "run")
    return two_epochs, f"output={tmp_path / 'run'}"


def test_an_extended_run_is_a_run_of_that_length(finished, tmp_path):
    """Bit for bit: two epochs and two more are four, at a constant rate."""
    recipe, output = finished
    before = weights(tmp_path / "run")
    said = finetune(recipe, "train.num_train_epochs=4", output, "--extend").stdout
    finetune(recipe, "train.num_train_epochs=4", f"output={tmp_path / 'straight'}")
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "straight"))
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert any(not torch.equal(before[name], value) for name, value in weights(tmp_path / "run").items())
    assert "extend      train.num_train_epochs was 2, is 4" in said
    assert "from step 4 on, of 8, the learning rate is that of the longer run's schedule (constant): 1.00e-02" in said
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "finished" and run["steps"] == 8
    [note] = run["extended"]
    assert (note["at_step"], note["key"], note["was"], note["now"]) == (4, "train.num_train_epochs", 2, 4)
    assert note["finished"]
    # The best checkpoint may be one of the first part.
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["eval_loss"] for line in evaluations if "eval_loss" in line}
    assert sorted(scores) == [2, 4, 6, 8]
    assert run["best_checkpoint"].endswith(f"step-{min(scores, key=scores.get)}")
    again = finetune(recipe, "train.num_train_epochs=4", output, "--extend").stdout
    assert "is finished" in again


def test_it_is_refused_without_the_word_and_named(finished, tmp_path):
    recipe, output = finished
    done = finetune(recipe, "train.num_train_epochs=4", output, check=False)
    assert done.returncode == 2
    assert (
        "train.num_train_epochs: 2 -> 4\nTo go on with it for that long, add --extend. Else give another"
        in done.stderr
    )
    done = finetune(recipe, "train.num_train_epochs=4", "train.learning_rate=1", output, check=False)
    assert done.returncode == 2 and "--extend" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], r"--extend: train.num_train_epochs is 2, and was 2"),
        (["train.num_train_epochs=1"], r"train.num_train_epochs is 1, and was 2"),
        (["train.max_steps=20"], r"is as long as train.num_train_epochs says, and the recipe sets train.max_steps"),
        (["train.num_train_epochs=4", "train.learning_rate=1"], r"train.learning_rate: 0.01 -> 1"),
    ],
)
def test_what_does_not_make_it_longer_is_refused(finished, changes, message):
    recipe, output = finished
    done = finetune(recipe, *changes, output, "--extend", check=False)
    assert done.returncode == 2 and message in done.stderr


def test_nothing_to_extend(two_epochs, tmp_path):
    done = finetune(two_epochs, f"output={tmp_path / 'new'}", "--extend", check=False)
    assert done.returncode == 2 and "--extend: there is no run in" in done.stderr


@pytest.mark.parametrize("loss", ["gone", "damaged"])
def test_the_state_of_the_last_step_must_be_there(finished, tmp_path, loss):
    recipe, output = finished
    last = tmp_path / "run" / "checkpoints" / "step-4"
    if loss == "gone":
        shutil.rmtree(last)
    else:
        (last / "optimizer.pt").write_bytes(b"")
    adapter = weights(tmp_path / "run")
    done = finetune(recipe, "train.num_train_epochs=4", output, "--extend", check=False)
    assert (
        done.returncode == 2 and "has no checkpoint of its last step" in done.stderr and "adapter.from" in done.stderr
    )
    assert_equal(weights(tmp_path / "run"), adapter)


@pytest.mark.slow
def test_the_schedule_is_the_longer_runs(tmp_path):
    recipe = write_recipe(tmp_path, train__max_steps=4, train__lr_scheduler_type="cosine")
    finetune(recipe)
    said = finetune(recipe, "train.max_steps=8", "--extend").stdout
    assert "(cosine): 5.00e-03 at this step, where the shorter run's was 0" in said
    for step, rate in rates(tmp_path / "run").items():
        length = 4 if step <= 4 else 8
        assert rate == pytest.approx(0.01 * (1 + math.cos(math.pi * (step - 1) / length)) / 2)
    assert sorted(rates(tmp_path / "run")) == list(range(1, 9))
    again = finetune(recipe, "train.max_steps=10", "--extend")
    assert [note["at_step"] for note in json.loads((tmp_path / "run" / "run.json").read_text())["extended"]] == [4, 8]
    assert "steps       10" in again.stdout


@pytest.mark.slow
def test_it_is_extended_after_a_kill_before_it_saved_again(tmp_path):
    recipe = write_recipe(tmp_path, train__max_steps=4, train__lr_scheduler_type="cosine", train__save_steps=100)
    finetune(recipe)
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    finetune(recipe, "train.max_steps=8", "--extend")
    # As a kill leaves it before the first new checkpoint: run.json is that of the longer run.
    run = json.loads((tmp_path / "run" / "run.json").read_text()) | {"status": "running"}
    (tmp_path / "killed" / "run.json").write_text(json.dumps(run))
    for file in ("recipe.yaml", "rows.npz"):
        shutil.copy(tmp_path / "run" / file, tmp_path / "killed" / file)
    finetune(recipe, "train.max_steps=8", f"output={tmp_path / 'killed'}")
    assert_equal(weights(tmp_path / "killed"), weights(tmp_path / "run"))


@pytest.mark.parametrize(
    ("state", "files", "message"),
    [
        ({"global_step": 4, "max_steps": 4}, ["scheduler.pt"], None),
        ({"global_step": 4, "max_steps": 9}, ["scheduler.pt"], r"ended at step 4 of 9, by evaluate.patience"),
        ({"global_step": 4, "max_steps": 4}, [], r"has the weights alone \(train.save_only_model\)"),
    ],
)
def test_what_a_finished_run_must_have(tmp_path, state, files, message):
    run = RunFolder(tmp_path)
    with writing(checkpoint_path(run.checkpoints, 4)) as partial:
        (partial / "trainer_state.json").write_text(json.dumps(state))
        for file in files:
            (partial / file).touch()
    recipes = [{"train": {"max_steps": steps, "num_train_epochs": 3}} for steps in (4, 9)]
    stored = {"status": "finished", "steps": 4, "finished": "today", "identity": {"recipe": recipes[0]}}
    last = find_last_good(run.checkpoints)
    if message is None:
        extension = extension_of(run, stored, recipes[1], "max_steps", last)
        assert extension == Extension(4, "train.max_steps", 4, 9, "today")
        assert pending([extension.to_json()], 4) and not pending([extension.to_json()], 6) and not pending([], 4)
        return
    with pytest.raises(UserError, match=message):
        extension_of(run, stored, recipes[1], "max_steps", last)


def test_the_rate_is_moved_to_the_longer_schedule():
    """Of each group, at the step of the checkpoint; the next step takes it."""

    def made(length):
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1.0, 0.1)]
        optimizer = torch.optim.SGD(groups)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / length)

    optimizer, scheduler = made(4)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    saved = optimizer.state_dict(), scheduler.state_dict()
    optimizer, scheduler = made(8)
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0]
    lines = []
    callback = FollowLongerSchedule(lambda label, text: lines.append(f"{label}: {text}"))
    arguments, state = SimpleNamespace(lr_scheduler_type="linear"), SimpleNamespace(global_step=4, max_steps=8)
    callback.on_train_begin(arguments, state, None, optimizer=optimizer, lr_scheduler=scheduler)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05] == scheduler.get_last_lr()
    assert "5.00e-01 at this step, where the shorter run's was 0" in lines[0]
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([3 / 8, 0.3 / 8])


def test_a_schedule_that_does_not_go_by_steps_stays():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    lines = []
    callback = FollowLongerSchedule(lambda label, text: lines.append(text))
    arguments = SimpleNamespace(lr_scheduler_type="reduce_lr_on_plateau")
    state = SimpleNamespace(global_step=4, max_steps=8)
    callback.on_train_begin(arguments, state, None, optimizer=optimizer, lr_scheduler=scheduler)
    assert optimizer.param_groups[0]["lr"] == 0.5 and "does not go by the number of steps" in lines[0]
