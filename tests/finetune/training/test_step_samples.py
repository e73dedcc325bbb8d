"""A run that goes on with another number of processes has the samples and the schedule that it would have had."""

import json
import shutil
from itertools import chain

import pytest
from forked_ranks import finetune_on, on_ranks
from recipes_for_tests import finetune, write_recipe
from steps_of_ranks import EPOCHS, SAMPLES, steps_of_rank

from finetune.batches.collate import NO_SAMPLE
from finetune.errors import UserError
from finetune.recipe import load_recipe
from finetune.training.step_samples import STEP, StepSamples, keep_samples_per_step, step_samples_before

BATCHES = 6  # of a step


def steps_on(folder, processes, shuffle=True):
    """For each epoch and step the samples of all processes, and what the schedule follows from."""
    on_ranks(processes, steps_of_rank, str(folder), processes, BATCHES // processes, shuffle)
    files = [folder / f"steps-{shuffle}-{processes}-{rank}.json" for rank in range(processes)]
    read = [json.loads(file.read_text()) for file in files]
    steps = [
        [sorted(chain.from_iterable(parts)) for parts in zip(*(one["steps"][epoch] for one in read), strict=True)]
        for epoch in range(EPOCHS)
    ]
    assert len({(one["per_epoch"], one["max_steps"]) for one in read}) == 1
    return steps, (read[0]["per_epoch"], read[0]["max_steps"])


def samples_of(steps):
    return [[[sample for sample in step if sample != NO_SAMPLE] for step in epoch] for epoch in steps]


@pytest.mark.parametrize(
    ("processes", "shuffle"),
    [(3, True), *(pytest.param(*one, marks=pytest.mark.slow) for one in [(2, True), (2, False), (3, False)])],
)
def test_the_samples_of_every_step_are_those_of_one_process(tmp_path, processes, shuffle):
    """17 samples in steps of 6: the last step of an epoch is not full, and repeats nothing."""
    alone, schedule = steps_on(tmp_path, 1, shuffle)
    together, theirs = steps_on(tmp_path, processes, shuffle)
    assert theirs == schedule == (3, 6)
    assert samples_of(together) == alone
    for epoch in alone:
        assert sorted(chain.from_iterable(epoch)) == list(range(SAMPLES))
    assert (alone[0] != alone[1]) == shuffle


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(write_recipe(tmp_path))  # accumulation 4, one sample a batch


def test_accumulation_adapts_and_it_is_said(recipe):
    said = []
    before = StepSamples(processes=2, per_device_train_batch_size=1, gradient_accumulation_steps=6)
    adapted = keep_samples_per_step(recipe, before, 3, 17, lambda *words: said.append(words))
    assert adapted.train.gradient_accumulation_steps == 4
    assert said[0][1].startswith(
        "3 now, 2 before: 4 accumulation steps instead of 6, so that a step has 12 samples as before"
    )
    assert recipe.model_copy(update={"train": adapted.train}) == adapted
    # As many as before: what that part had is kept, be it adapted or not.
    again = keep_samples_per_step(recipe, before, 2, 17, lambda *words: pytest.fail("nothing changes"))
    assert again.train.gradient_accumulation_steps == 6
    assert keep_samples_per_step(recipe, None, 5, 17, lambda *words: pytest.fail("nothing is known")) is recipe


def test_numbers_that_cannot_have_the_steps_are_refused(recipe):
    before = StepSamples(processes=2, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    with pytest.raises(
        UserError, match=r"a step of this run has 24 samples, and 5 processes .*: start it on 1, 2, 3 or 6 proc"
    ):
        keep_samples_per_step(recipe, before, 5, 17, lambda *words: None)


def test_what_is_left_out_at_an_epochs_end_is_the_same_or_it_is_refused(recipe):
    train = recipe.train.model_copy(update={"dataloader_drop_last": True})
    drops = recipe.model_copy(update={"train": train})
    before = StepSamples(processes=2, per_device_train_batch_size=1, gradient_accumulation_steps=6)
    with pytest.raises(UserError, match=r"dataloader_drop_last leaves out other samples"):
        keep_samples_per_step(drops, before, 3, 17, lambda *words: None)
    keep_samples_per_step(drops, before, 3, 18, lambda *words: None)


def test_an_older_run_is_known_by_its_checkpoint(recipe, tmp_path):
    assert step_samples_before({}, recipe, tmp_path) is None
    (tmp_path / "rng_state.pth").touch()
    assert step_samples_before({}, recipe, tmp_path) == StepSamples(1, 1, 4)
    for rank in range(3):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    assert step_samples_before({}, recipe, tmp_path) == StepSamples(3, 1, 4)
    own = StepSamples(2, 8, 1)
    assert step_samples_before({STEP: own.to_json()}, recipe, tmp_path) == own


def back_to(run, step):
    """As if the run had been killed after this step."""
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"status": "running"}))
    shutil.rmtree(run / "adapter")
    for folder in (run / "checkpoints").iterdir():
        if folder.name != f"step-{step}":
            shutil.rmtree(folder)


def logged(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: (record["loss"], record["learning_rate"]) for record in records if "loss" in record}


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """Through the ends of epochs: the same losses and learning rates as without a break."""
    settings = {"adapter__dropout": 0.0, "train__max_steps": 6, "train__save_total_limit": 9}
    recipe = write_recipe(tmp_path, **settings)
    finetune(recipe)
    run, whole = tmp_path / "run", logged(tmp_path / "run")
    assert len(whole) == 6
    assert json.loads((run / "run.json").read_text())[STEP] == StepSamples(1, 1, 4).to_json()
    back_to(run, 2)
    first, second = finetune_on(2, recipe)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "2 now, 1 before: 2 accumulation steps instead of 4, so that a step has 4 samples" in first.stdout
    for step, (loss, rate) in logged(run).items():
        assert loss == pytest.approx(whole[step][0], abs=1e-4) and rate == whole[step][1], step
    assert logged(run).keys() == whole.keys()
    back_to(run, 4)
    done = finetune_on(3, recipe)
    assert done[0].returncode == 2 and all(one.returncode for one in done)  # others may only see that it ended
    assert "3 processes" in done[0].stderr and "start it on 1, 2 or 4 processes" in done[0].stderr
