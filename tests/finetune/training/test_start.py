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
