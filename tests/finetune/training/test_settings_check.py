"""Settings that only libraries, task and data can judge: refused by `check`, and by training before weights load."""

import pytest
from recipes_for_tests import write_recipe, write_rows
from said import collect

from finetune.check.check import check
from finetune.errors import UserError
from finetune.recipe import load_recipe
from finetune.training import train as road
from finetune.training.settings_check import TRACKERS

EVERY_STEP = ["train.eval_strategy=steps", "train.eval_steps=1", "train.load_best_model_at_end=true"]
REFUSED = {
    "tracker": (["train.report_to=neptune"], "train.report_to: neptune needs a package .*: pip install neptune"),
    "trackers": (["train.report_to=[wandb, swanlab]"], "swanlab needs a package"),
    "typo of a tracker": (["train.report_to=wandbb"], "report_to: wandbb is unknown; did you mean wandb"),
    "score": (
        [*EVERY_STEP, "evaluate.task=custom", "evaluate.metric=anls", "train.metric_for_best_model=eval_anl"],
        "train.metric_for_best_model: eval_anl is not measured; did you mean eval_anls",
    ),
    "no min_lr": (
        ["train.lr_scheduler_type=cosine_with_min_lr"],
        "lr_scheduler_kwargs: cosine_with_min_lr cannot be made: One of min_lr or min_lr_rate should be set",
    ),
    "typo of min_lr": (
        ["train.lr_scheduler_type=cosine_with_min_lr", "train.lr_scheduler_kwargs={min_lrr: 1e-6}"],
        "cosine_with_min_lr takes no min_lrr; did you mean min_lr",
    ),
    "what the trainer gives": (
        ["train.lr_scheduler_type=cosine", "train.lr_scheduler_kwargs={num_training_steps: 9}"],
        "cosine takes no num_training_steps; it takes num_cycles",
    ),
    "no decay steps": (
        ["train.lr_scheduler_type=warmup_stable_decay"],
        "warmup_stable_decay needs num_decay_steps: write",
    ),
    "min_lr above": (
        ["train.lr_scheduler_type=cosine_with_min_lr", "train.lr_scheduler_kwargs={min_lr: 0.1}"],
        "would rise to 9.66e-02, and train.learning_rate is 1.00e-02",
    ),
    "text": (
        ["train.lr_scheduler_type=polynomial", "train.lr_scheduler_kwargs={power: much}"],
        "lr_scheduler_kwargs: polynomial cannot be made",
    ),
    "plateau": (
        [*EVERY_STEP, "train.lr_scheduler_type=reduce_lr_on_plateau", "train.lr_scheduler_kwargs={factor: 2.0}"],
        "reduce_lr_on_plateau cannot be made: Factor should be < 1.0",
    ),
    "patience": (
        [*EVERY_STEP, "train.lr_scheduler_type=reduce_lr_on_plateau", "train.lr_scheduler_kwargs={patience: a}"],
        "reduce_lr_on_plateau cannot be made: '>' not supported",
    ),
    "optimizer's argument": (
        ["train.optim=sgd", "train.optim_args='momentum=much'"],
        "train.optim_args: sgd cannot be made: could not convert string to float",
    ),
    "nesterov": (
        ["train.optim=sgd", "train.optim_args='nesterov=true'"],
        "sgd cannot be made: Nesterov momentum requires a momentum",
    ),
    "no whole batch": (
        ["train.dataloader_drop_last=true", "train.per_device_train_batch_size=20"],
        "train.dataloader_drop_last: 14 samples make no whole batch of 20, and every step would be dropped",
    ),
    "late evaluation": (
        ["train.eval_strategy=steps", "train.max_steps=-1", "train.eval_delay=99"],
        "train.eval_delay: no evaluation would take place: the run has 12 steps",
    ),
    "late epochs": (["train.eval_delay=2.5", "train.max_steps=3"], "the run has 0.75 epochs"),
}


@pytest.fixture
def file(tmp_path):
    evaluation = {"data": [{"path": str(tmp_path / "eval.jsonl"), "format": "messages"}], "predictions": 0}
    return write_recipe(tmp_path, evaluate=evaluation)


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def loads(*args, **kwargs):
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr(road, "load_trained_model", loads)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_check_and_before_the_weights_load(file, name, capsys):
    overrides, message = REFUSED[name]
    recipe = load_recipe(file, overrides)
    with pytest.raises(UserError, match=message):
        road.train(recipe, say=collect([]))
    if name in ("tracker", "score", "no min_lr", "no whole batch"):  # it asks the same function
        with pytest.raises(UserError, match=rf"a run would stop here:(?s:.*){message}"):
            check(recipe, samples=0)
        capsys.readouterr()


def test_a_package_that_is_absent_is_named(file, monkeypatch):
    from finetune.training import settings_check

    monkeypatch.setattr(settings_check, "is_bitsandbytes_available", lambda: False)
    monkeypatch.setattr(settings_check, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"paged_adamw_8bit needs bitsandbytes, .*: pip install bitsandbytes"):
        road.train(load_recipe(file, ["train.optim=paged_adamw_8bit"]), say=collect([]))


def test_tf32_needs_its_gpu(file, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: False)
    with pytest.raises(UserError, match="train: Transformers refuses these settings: --tf32 requires"):
        road.train(load_recipe(file, ["train.tf32=true"]), say=collect([]))


def test_all_reasons_are_told_together(file):
    with pytest.raises(UserError) as caught:
        road.train(load_recipe(file, ["train.report_to=neptune", "train.lr_scheduler_type=cosine_with_min_lr"]))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("score", ["eval_anls", "anls", "eval_anls_first", "eval_loss", "loss"])
def test_scores_that_are_measured(tmp_path, score):
    sources = [
        {"path": str(tmp_path / "eval.jsonl"), "format": "messages", "name": name} for name in ("first", "next")
    ]
    file = write_recipe(tmp_path, evaluate={"data": sources, "task": "custom", "metric": "anls"})
    write_rows(tmp_path / "eval.jsonl", 6)
    with pytest.raises(AssertionError, match="the weights are loaded"):
        road.train(load_recipe(file, [f"train.metric_for_best_model={score}"]), say=collect([]))


def test_a_warm_up_that_does_not_end_is_told(file, capsys):
    said: list[str] = []
    recipe = load_recipe(file, ["train.warmup_steps=20"])
    with pytest.raises(AssertionError, match="the weights are loaded"):
        road.train(recipe, say=collect(said))
    told = "the warm-up has 20 steps (train.warmup_steps) and the run 8: the learning rate gets to 3.50e-03"
    assert any(told in line for line in said)
    check(recipe, samples=0)
    assert told in capsys.readouterr().out


def test_a_decay_that_does_not_end_is_told(file):
    said: list[str] = []
    overrides = ["train.lr_scheduler_type=warmup_stable_decay", "train.lr_scheduler_kwargs={num_decay_steps: 30}"]
    with pytest.raises(AssertionError, match="the weights are loaded"):
        road.train(load_recipe(file, overrides), say=collect(said))
    assert any("the decay does not come to its end" in line for line in said)


def test_a_check_starts_no_group_of_processes(file, monkeypatch, capsys):
    """WORLD_SIZE tells a check how many processes to count with."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    check(load_recipe(file), samples=0)
    assert "on 4 processes" in capsys.readouterr().out


@pytest.mark.parametrize("sharding", ["train.deepspeed={folder}/ds.json", "train.fsdp=true"])
def test_a_check_leaves_sharding_to_the_processes(file, sharding, capsys):
    (file.parent / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    sharding = sharding.format(folder=file.parent)
    check(load_recipe(file, [sharding]), samples=0)
    capsys.readouterr()
    with pytest.raises(UserError, match="report_to: neptune"):
        check(load_recipe(file, [sharding, "train.report_to=neptune"]), samples=0)
    capsys.readouterr()


def test_the_trackers_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(TRACKERS) | {"kubeflow"} == set(INTEGRATION_TO_CALLBACK)
