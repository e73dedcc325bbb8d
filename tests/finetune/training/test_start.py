"""Where a run stands: fresh, resumed at a step, or finished; and what may not be resumed."""

from dataclasses import replace

import pytest
from recipes_for_tests import write_recipe
from said import collect

from finetune.errors import InputError, UserError
from finetune.recipe import load_recipe
from finetune.run.checkpoints import checkpoint_path, writing
from finetune.run.folder import RunFolder
from finetune.terminal import say_nothing
from finetune.training.start import Finished, Fresh, Resume, find_start, run_identity
from qwenvl.checkpoint.identity import BaseIdentity

BASE = BaseIdentity("a" * 32, {"seq_length": 700, "visual.image_size": 280}, "b" * 32, "c" * 32)


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(write_recipe(tmp_path))


@pytest.fixture
def run(recipe) -> RunFolder:
    return RunFolder(recipe.output)


def start_of(run, recipe, identity=None, **stored):
    identity = run_identity(recipe, {}, BASE) if identity is None else identity
    if stored:
        run.write_run({"identity": run_identity(recipe, {}, BASE), **stored})
    return find_start(run, recipe, identity, run.read_run(), say_nothing)


def save(run: RunFolder, step: int):
    run.checkpoints.mkdir(exist_ok=True)
    with writing(checkpoint_path(run.checkpoints, step)) as partial:
        (partial / "state").write_text(str(step))


def test_an_empty_folder(run, recipe):
    assert start_of(run, recipe) == Fresh()


def test_a_run_that_was_stopped_before_its_first_checkpoint(run, recipe):
    assert start_of(run, recipe, status="running") == Fresh()


def test_a_run_with_checkpoints(run, recipe):
    run.write_run({})
    save(run, 2)
    save(run, 10)
    run.append_metrics({"step": 10, "loss": 1.0})
    run.append_metrics({"step": 12, "loss": 0.5})
    assert start_of(run, recipe, status="interrupted") == Resume(run.checkpoints / "step-10", 10)
    assert [record["step"] for record in run.read_metrics()] == [10]  # the steps after it are trained again


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(run, recipe):
    run.write_run({})
    save(run, 2)
    save(run, 4)
    (run.checkpoints / "step-4" / "state").write_text("5")
    run.write_run({"identity": run_identity(recipe, {}, BASE), "status": "running"})
    said: list[str] = []
    start = find_start(run, recipe, run_identity(recipe, {}, BASE), run.read_run(), collect(said))
    assert start == Resume(run.checkpoints / "step-2", 2)
    assert "step-4 is damaged" in said[0] and said[1] == "resume      from step 2"


def test_a_finished_run(run, recipe):
    with pytest.raises(UserError, match=r"is finished, but its result, .*adapter, is gone: restore it, or give"):
        start_of(run, recipe, status="finished")
    run.adapter.mkdir()
    assert start_of(run, recipe, status="finished") == Finished()


def test_another_base_is_refused(run, recipe):
    changes = {
        "base: other weights .fingerprint was a{32}, is 0": {"weights": "0"},
        r"base: qwen\.tiktoken: other tokens": {"tokenizer": "0"},
        r"base: config\.json: visual\.image_size was 280, is 140": {
            "computation": BASE.computation | {"visual.image_size": 140}
        },
    }
    for told, change in changes.items():
        other = run_identity(recipe, {}, replace(BASE, **change))
        with pytest.raises(UserError, match=f"would not continue:\n  {told}.*\nGive another output"):
            start_of(run, recipe, other, status="finished")


def test_a_run_from_before_is_known_by_the_sampled_values(run, recipe):
    run.write_run({"identity": {**run_identity(recipe, {}, BASE), "base": BASE.sampled}, "status": "running"})
    assert start_of(run, recipe) == Fresh()
    other = run_identity(recipe, {}, replace(BASE, sampled="0"))
    with pytest.raises(UserError, match=r"base: other weights \(fingerprint was c{32}, is 0"):
        start_of(run, recipe, other)


def test_what_auto_trains_must_be_as_it_was(run, recipe):
    run.write_run({"identity": run_identity(recipe, {}, BASE, True), "status": "running"})
    assert start_of(run, recipe, run_identity(recipe, {}, BASE, True)) == Fresh()
    with pytest.raises(
        UserError, match=r"train_embeddings: auto was true, is false: the base's chat_format was chang"
    ):
        start_of(run, recipe, run_identity(recipe, {}, BASE, False))
    run.write_run({"identity": run_identity(recipe, {}, BASE), "status": "running"})  # of before it was noted
    assert start_of(run, recipe, run_identity(recipe, {}, BASE, False)) == Fresh()


def test_a_process_that_has_not_read_the_base_compares_all_else(run, recipe):
    identity = run_identity(recipe, {}, None)
    assert start_of(run, recipe, identity, status="running") == Fresh()
    identity["recipe"]["seed"] = 99
    with pytest.raises(UserError, match=r"continue:\n  recipe\.seed: 3 -> 99\nGive"):
        start_of(run, recipe, identity, status="running")


def test_a_damaged_identity_is_named(run, recipe):
    run.write_run({"identity": {**run_identity(recipe, {}, BASE), "base": 5}, "status": "running"})
    with pytest.raises(InputError, match=r"run\.json: what it says of the base's fingerprints is damaged"):
        start_of(run, recipe)


def test_resume_never_is_refused(tmp_path, run):
    recipe = load_recipe(write_recipe(tmp_path), ["resume=never"])
    with pytest.raises(UserError, match="holds a run already, and resume is never"):
        start_of(run, recipe, status="running")


def test_keys_that_recipes_got_later_are_no_difference(run, recipe):
    """A run of before goes on where they are at their defaults, which do what was done then."""
    stored = run_identity(recipe, {}, BASE)
    del stored["recipe"]["data"]["box_edge"], stored["recipe"]["data"]["no_object"]
    run.write_run({"identity": stored})
    save(run, 2)
    assert start_of(run, recipe) == Resume(run.checkpoints / "step-2", 2)
    other = run_identity(recipe, {}, BASE)
    other["recipe"]["data"]["box_edge"] = "clamp"
    with pytest.raises(UserError, match=r'recipe\.data\.box_edge: "error" -> "clamp"'):
        start_of(run, recipe, other)


def test_fields_that_are_refused_by_now_are_no_difference(run, recipe):
    """A run of before goes on if it left them alone, and else says what it had."""
    stored = run_identity(recipe, {}, BASE)
    stored["recipe"]["train"] |= {"save_only_model": False, "torch_compile": False, "accelerator_config": None}
    run.write_run({"identity": stored})
    save(run, 2)
    assert start_of(run, recipe) == Resume(run.checkpoints / "step-2", 2)
    stored["recipe"]["train"]["torch_compile"] = True
    run.write_run({"identity": stored})
    with pytest.raises(UserError, match=r"recipe\.train\.torch_compile: true -> \(absent\)"):
        start_of(run, recipe)


def changed(folder, *overrides, before=(), **changes):
    """Find where a run stands whose recipe was changed since it began; return what is said."""
    file = write_recipe(folder, **changes)
    then, now = load_recipe(file, before), load_recipe(file, [*before, *overrides])
    run = RunFolder(then.output)
    run.write_run({"identity": run_identity(then, {}, BASE)})
    save(run, 2)
    said: list[str] = []
    find_start(run, now, run_identity(now, {}, BASE), run.read_run(), collect(said))
    return said


def test_most_new_tokens_may_change_where_they_decide_no_score(tmp_path):
    evaluation = {"data": [{"path": str(tmp_path / "eval.jsonl"), "format": "messages"}]}
    assert changed(tmp_path, "evaluate.max_new_tokens=9", evaluate=evaluation)
    scored = evaluation | {"task": "custom", "metric": "anls"}
    with pytest.raises(UserError, match=r"evaluate\.max_new_tokens: 64 -> 9"):
        changed(tmp_path, "evaluate.max_new_tokens=9", evaluate=scored)


def test_steps_of_the_log_may_change_where_they_are_not_those_of_the_evaluation(tmp_path):
    evaluation = {"data": [{"path": str(tmp_path / "eval.jsonl"), "format": "messages"}]}
    by_steps = ["train.eval_strategy=steps"]
    assert changed(tmp_path, "train.logging_steps=3", evaluate=evaluation)
    assert changed(tmp_path, "train.logging_steps=3", evaluate=evaluation, before=[*by_steps, "train.eval_steps=2"])
    with pytest.raises(UserError, match=r"train\.logging_steps: 1 -> 3"):
        changed(tmp_path, "train.logging_steps=3", evaluate=evaluation, before=by_steps)


@pytest.mark.parametrize(
    "override",
    [
        *("train.save_strategy=epoch", "train.save_total_limit=5", "train.log_level=info", "train.run_name=other"),
        *("train.gradient_checkpointing=true", "train.report_to=[wandb]", "train.dataloader_pin_memory=false"),
    ],
)
def test_what_changes_no_number_may_change(tmp_path, override):
    assert changed(tmp_path, override) == ["resume      from step 2"]


@pytest.mark.parametrize("override", ["model.attention=sdpa", "data.tokens_per_batch=3000", "data.vision_cache=disk"])
def test_what_changes_rounding_is_told(tmp_path, override):
    _, said = changed(tmp_path, override)
    key, value = override.split("=")
    assert key in said and value in said and "not bit for bit as it would have" in said
