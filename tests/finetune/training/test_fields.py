"""Every field of `SFTConfig`: refused with its reason, or right with packing, after a kill and on two processes."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recipes_for_tests import finetune, write_recipe
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from finetune.check.check import check
from finetune.errors import InputError
from finetune.recipe import RecipeError, load_recipe
from finetune.recipe.train_section import FIELDS, OWNED
from finetune.terminal import say_nothing
from finetune.training.best_checkpoint import Patience, SaveBest
from finetune.training.train import train

SHARDING = {"fsdp", "fsdp_config", "deepspeed", "ddp_backend", "ddp_timeout"}
"""Of several processes; their tests are those of `train.parallel` and of the launchers."""

PLAIN = {
    "max_steps": 6,
    "per_device_train_batch_size": 3,  # packed into one row
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "save_steps": 2,
    "save_total_limit": 9,
    "gradient_checkpointing": False,
}
SETTINGS = {
    "by score": {
        "optim": "sgd",
        "optim_args": "momentum=0.9,nesterov=true",
        "weight_decay": 0.1,
        "max_grad_norm": 0.05,
        "tf32": False,
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 0.2},
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_delay": 2,
        "eval_on_start": True,
        "per_device_eval_batch_size": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
    },
    "epochs": {
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 1e-6},
        "warmup_steps": 0.3,
        "num_train_epochs": 3,
        "max_steps": -1,
        "per_device_train_batch_size": 4,  # of 14: two are dropped
        "gradient_accumulation_steps": 1,
        "dataloader_drop_last": True,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "neftune_noise_alpha": 5.0,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "logging_strategy": "epoch",
        "logging_first_step": True,
        "save_strategy": "epoch",
        "log_level": "warning",
        "log_level_replica": "error",
        "report_to": ["none"],
        "run_name": "one",
        "project": "tests",
    },
}
"""Each field with a value that is not its default, in runs of packs of several conversations."""

WORKERS = {
    "dataloader_prefetch_factor": 3,
    "dataloader_persistent_workers": False,
    "dataloader_multiprocessing_context": "forkserver",
    "dataloader_pin_memory": False,
}

OPTIMIZERS = (
    *("adamw_torch", "adafactor", "adagrad", "rmsprop", "ademamix", "adamw_bnb_8bit", "adamw_8bit", "ademamix_8bit"),
    *("lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit"),
    *("paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit"),
    "rmsprop_bnb_32bit",
)
SCHEDULES = {
    "linear": {},
    "cosine": {"num_cycles": 0.4},
    "cosine_with_restarts": {"num_cycles": 2},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": 3},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


def test_every_field_is_decided_on():
    """A field that TRL adds is in neither list: decide, by a run in `SETTINGS` or a reason in `OWNED`."""
    works = {field for fields in (PLAIN, WORKERS, *SETTINGS.values()) for field in fields}
    assert works | SHARDING == FIELDS.keys() - OWNED.keys()
    assert {name for name in OWNED if name not in FIELDS} == set()
    assert all(instead or why for instead, why in OWNED.values())


def test_every_optimizer_and_schedule_is_decided_on():
    from finetune.recipe.train_checks import REFUSED_OPTIMIZERS

    assert {*OPTIMIZERS, "sgd", "adamw_torch_fused"} | set(REFUSED_OPTIMIZERS) == set(FIELDS["optim"]["choices"])
    assert {*SCHEDULES, "polynomial", "reduce_lr_on_plateau", "greedy"} == set(FIELDS["lr_scheduler_type"]["choices"])


def recipe_file(folder: Path, settings: dict, **changes) -> Path:
    evaluation = {"data": [{"path": str(folder / "eval.jsonl"), "format": "messages"}], "predictions": 0}
    changes = {"evaluate": evaluation, **changes}
    if "eval_strategy" not in settings:
        settings = {"eval_strategy": "no", **settings}
    return write_recipe(folder, train={**PLAIN, **settings}, **changes)


def metrics_of(run: Path) -> list[dict]:
    """What was logged, without times and memory."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    ours = ("_per_second", "_seconds", "_runtime", "_bytes", "total_flos", "train_loss")
    return [{key: value for key, value in json.loads(line).items() if not key.endswith(ours)} for line in lines]


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_resumes_exactly(file: Path, to: Path) -> Path:
    """Train; then train on from a checkpoint in the middle, as after a kill, and compare."""
    whole = train(load_recipe(file), say_nothing)
    cut = Path(shutil.copytree(whole, to))
    steps = sorted(int(folder.name.removeprefix("step-")) for folder in (cut / "checkpoints").iterdir())
    middle = steps[len(steps) // 2 - 1]
    assert middle < steps[-1]
    for step in steps:
        if step > middle:
            shutil.rmtree(cut / "checkpoints" / f"step-{step}")
    shutil.rmtree(cut / "adapter")
    facts = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps({**facts, "status": "running"}))
    again = train(load_recipe(file, [f"output={cut}"]), say_nothing)
    expected, ours = adapter_of(whole), adapter_of(again)
    assert expected.keys() == ours.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)
    logged, expected_log = (
        {record["step"]: record for record in metrics_of(run) if "loss" in record and record["step"] > middle + 1}
        for run in (again, whole)
    )
    assert logged == expected_log and logged
    scores, expected_scores = (
        [(record["step"], record["eval_loss"]) for record in metrics_of(run) if "eval_loss" in record]
        for run in (again, whole)
    )
    assert scores == expected_scores
    return whole


@pytest.mark.parametrize("name", ["by score", pytest.param("epochs", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, name):
    run = assert_resumes_exactly(recipe_file(tmp_path, SETTINGS[name]), tmp_path / "cut")
    records = metrics_of(run)
    rates = {record["step"]: record["learning_rate"] for record in records if "learning_rate" in record}
    scores = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    if name == "by score":
        assert list(scores) == [0, 2, 3, 4, 5, 6] and len(set(rates.values())) > 1
        best = min((step for step in scores if step), key=lambda step: scores[step])
        assert json.loads((run / "run.json").read_text())["best_checkpoint"].endswith(f"step-{best}")
    if name == "epochs":
        # The first step, and each epoch's last; warm-up of ceil(9 x 0.3) steps, then a square.
        assert list(rates) == [1, 3, 6, 9]
        assert rates[1] == 0
        squares = [(5e-3 - 1e-6) * (1 - done / 6) ** 2 + 1e-6 for done in (2, 5)]
        assert [rates[6], rates[9]] == pytest.approx(squares)


def test_an_evaluation_before_training_is_not_the_best_so_far():
    """It has no checkpoint, so the first that is better than the others after it has to be saved."""
    state = TrainerState(log_history=[{"step": 0, "eval_loss": 1.0}, {"step": 2, "eval_loss": 3.0}])
    args = SimpleNamespace(metric_for_best_model="eval_loss", greater_is_better=False)
    assert SaveBest().on_evaluate(args, state, TrainerControl()).should_save
    assert not Patience(1).on_evaluate(args, state, TrainerControl()).should_training_stop


def test_patience_without_the_best_checkpoint(tmp_path):
    """The last step's result, after one evaluation that is no better than the one before."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": False, "save_strategy": "no"}
    file = recipe_file(tmp_path, settings | {"learning_rate": 1e-30})
    run = train(load_recipe(file, ["evaluate.patience=1"]), say_nothing)
    assert [record["step"] for record in metrics_of(run) if "eval_loss" in record] == [1, 2]
    assert json.loads((run / "run.json").read_text())["steps"] == 2


VALUES = {
    "boolean": [True, False],
    "integer": [-1, 0, 1, 3],
    "number": [0.0, 0.3, 1.0, 2.0, 1e-30, 1e10],
    "string": ["x", "all", "mlflow", ""],
    "array": [[], ["none"], ["wandb"]],
    "object": [{}, {"a": 1}, {"use_reentrant": False}],
    "null": [None],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FIELDS.keys() - OWNED.keys() - SHARDING - {"num_train_epochs"}))
@pytest.mark.parametrize("scored", [False, True])
def test_no_value_ends_in_a_traceback(tmp_path, name, scored, capsys):
    """A value is taken by recipe, check and training, or refused by both of these: never by training alone."""
    about = FIELDS[name]
    tried = about.get("choices") or [value for kind in about["types"] for value in VALUES[kind]]
    for number, value in enumerate(tried):
        settings = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, name: value}
        file = recipe_file(tmp_path / str(number), {"eval_strategy": "epoch", **settings})
        task = ["evaluate.task=custom", "evaluate.metric=anls", "evaluate.sample=2", "evaluate.max_new_tokens=3"]
        try:
            recipe = load_recipe(file, task if scored else [])
        except RecipeError:
            continue
        refused = []
        for run in (lambda recipe: check(recipe, samples=0), lambda recipe: train(recipe, say_nothing)):
            try:
                run(recipe)
            except InputError as error:
                refused.append(str(error))
        assert len(refused) in (0, 2), (value, refused)
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_for_bit(tmp_path, optim):
    pytest.importorskip("bitsandbytes")
    assert_resumes_exactly(recipe_file(tmp_path, {"optim": optim, "learning_rate": 1e-3}), tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_goes_on_bit_for_bit(tmp_path, schedule):
    settings = {"lr_scheduler_type": schedule, "warmup_steps": 0 if schedule == "constant" else 2}
    settings["lr_scheduler_kwargs"] = SCHEDULES[schedule] or None
    run = assert_resumes_exactly(recipe_file(tmp_path, settings), tmp_path / "cut")
    rates = [record["learning_rate"] for record in metrics_of(run) if "learning_rate" in record]
    assert len(rates) == 6 and max(rates) == pytest.approx(5e-3)


@pytest.mark.slow
def test_settings_of_the_loader_change_nothing(tmp_path):
    runs = {}
    for name, settings in (("plain", {}), ("workers", WORKERS)):
        file = recipe_file(tmp_path / name, settings, data__workers=2 if settings else 0)
        finetune(file)
        runs[name] = adapter_of(tmp_path / name / "run")
    assert all(torch.equal(tensor, runs["plain"][name]) for name, tensor in runs["workers"].items())


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_as_one_does(tmp_path, name):
    """With twice the accumulation in one process; noise on the embeddings is drawn by each, and is left out."""
    plain = {"adapter__dropout": 0.0, "data__shuffle": False}
    settings = {key: value for key, value in SETTINGS[name].items() if key != "neftune_noise_alpha"}
    accumulation = {**PLAIN, **settings}["gradient_accumulation_steps"]
    twice = {**settings, "gradient_accumulation_steps": 2 * accumulation}
    if name == "epochs":  # two batches of each process, or four of one
        settings |= {"per_device_train_batch_size": 3}
        twice |= {"per_device_train_batch_size": 3}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Where batches do not divide among processes, samples are repeated.
    rows = "data.train.0.limit=12"
    finetune(recipe_file(tmp_path / "one", twice, **plain), rows, env=environment)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port")
    finetune(
        recipe_file(tmp_path / "two", settings, **plain),
        rows,
        env=environment,
        launcher=(*launcher, str(20000 + os.getpid() % 20000)),
    )
    one, two = (metrics_of(tmp_path / folder / "run") for folder in ("one", "two"))
    for key in ("loss", "eval_loss", "learning_rate"):
        values, others = ([(record["step"], record[key]) for record in log if key in record] for log in (one, two))
        assert [step for step, _ in values] == [step for step, _ in others]
        assert [value for _, value in values] == pytest.approx([value for _, value in others], rel=2e-3, abs=1e-5)
    ours, expected = adapter_of(tmp_path / "two" / "run"), adapter_of(tmp_path / "one" / "run")
    assert all(torch.allclose(ours[key], expected[key], atol=2e-3) for key in expected)


@pytest.mark.slow
def test_fields_of_one_run_on_two_processes(tmp_path):
    """Noise too: the run ends, and both processes have the same weights, or DDP would have told."""
    file = recipe_file(tmp_path, SETTINGS["epochs"])
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port")
    finetune(file, env={**os.environ, "OMP_NUM_THREADS": "1"}, launcher=(*launcher, str(20000 + os.getpid() % 20000)))
    assert all(torch.isfinite(tensor).all() for tensor in adapter_of(tmp_path / "run").values())
