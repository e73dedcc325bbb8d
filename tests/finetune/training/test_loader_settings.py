"""Loader workers: the same batches as without, uint8, made ahead of the step."""

from contextlib import ExitStack

import pytest
import torch
from recipes_for_tests import write_recipe

from finetune.recipe import load_recipe
from finetune.run.folder import RunFolder
from finetune.run.left_out import LeftOut
from finetune.terminal import say_nothing
from finetune.training import trainer_setup
from finetune.training.arguments import loader_settings
from finetune.training.interrupts import StopOnSignal
from finetune.training.opened_run import open_run
from finetune.training.parallel import Parallel
from finetune.training.phases import Phases
from finetune.training.progress import Progress
from finetune.training.trained_model import load_trained_model
from finetune.training.training_plan import plan_training, settle_arguments
from qwenvl.checkpoint.record import ModelRecord


def open_recipe(file):
    recipe = load_recipe(file)
    return open_run(recipe, Parallel(), RunFolder(recipe.output), None, ExitStack(), say_nothing, extend=False)


def make_trainer(folder, workers, **changes):
    evaluation = {"data": {"path": str(folder / "eval.jsonl"), "format": "messages"}, "predictions": 0}
    changes = {"train__per_device_train_batch_size": 3, **changes}
    opened = open_recipe(write_recipe(folder, data__workers=workers, evaluate=evaluation, **changes))
    plan = plan_training(opened, say_nothing)
    arguments = settle_arguments(opened, plan, say_nothing, own_optimizer=False)
    return trainer_setup.make_trainer(
        opened,
        plan,
        load_trained_model(opened, plan.switches, arguments, say_nothing),
        arguments,
        None,
        ModelRecord(),
        LeftOut(None, "error"),
        stop=StopOnSignal(),
        progress=Progress(),
        phases=Phases("load"),
        optimizer=None,
    )


def two_epochs(trainer):
    """Batches of two epochs, and of an evaluation after each, as the trainer gets them."""
    loader = trainer.get_train_dataloader()
    batches = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches += list(loader)
        batches += list(trainer.get_eval_dataloader())
    return loader, batches


def test_batches_are_the_same_with_workers(tmp_path):
    _, wanted = two_epochs(make_trainer(tmp_path / "0", 0))
    loader, batches = two_epochs(make_trainer(tmp_path / "2", 2))
    assert (loader.num_workers, loader.persistent_workers, loader.prefetch_factor) == (2, True, 2)
    assert len(batches) == len(wanted) == 2 * (5 + 1)
    for batch, other in zip(batches, wanted, strict=True):
        assert batch.keys() == other.keys()
        for name, tensor in batch.items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=0)
            assert tensor.dtype == other[name].dtype
    with_images = [batch["pixel_values"] for batch in batches if "pixel_values" in batch]
    assert with_images and {pixels.dtype for pixels in with_images} == {torch.uint8}
    orders = [torch.cat([batch["samples"] for batch in wanted[start : start + 5]]).tolist() for start in (0, 6)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(14)) and orders[0] != orders[1]


def test_an_incomplete_batch_is_dropped_in_training_alone(tmp_path):
    settings = {"train__dataloader_drop_last": True, "train__per_device_eval_batch_size": 3}
    trainer = make_trainer(tmp_path, 0, **settings)
    assert [len(batch["sequence_lengths"]) for batch in trainer.get_train_dataloader()] == [3, 3, 3, 3]  # of 14
    assert [len(batch["sequence_lengths"]) for batch in trainer.get_eval_dataloader()] == [3, 1]
    assert trainer.args.dataloader_drop_last is True


@pytest.mark.parametrize(("workers", "accumulation", "ahead"), [(2, 1, 2), (2, 16, 8), (3, 16, 6), (8, 8, 2)])
def test_the_next_optimizer_step_is_made_ahead(workers, accumulation, ahead):
    settings = loader_settings(workers, accumulation)
    assert settings["dataloader_prefetch_factor"] == ahead
    assert ahead * workers >= accumulation
    assert settings["dataloader_persistent_workers"] is True
    assert "dataloader_prefetch_factor" not in loader_settings(0, accumulation)


def test_a_recipe_may_say_otherwise(tmp_path):
    file = write_recipe(tmp_path, data__workers=2, train__dataloader_prefetch_factor=5)
    opened = open_recipe(file)
    arguments = settle_arguments(opened, plan_training(opened, say_nothing), say_nothing, own_optimizer=False)
    assert (arguments.dataloader_prefetch_factor, arguments.dataloader_num_workers) == (5, 2)
    assert arguments.dataloader_pin_memory is torch.cuda.is_available()
