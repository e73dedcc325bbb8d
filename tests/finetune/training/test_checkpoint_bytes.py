"""The room that a run asks for is what its checkpoints and its result take."""

import pytest
from recipes_for_tests import write_recipe

from finetune.recipe import load_recipe
from finetune.terminal import say_nothing
from finetune.training import trainer_setup
from finetune.training.train import train

IN_FULL = {"adapter": None, "freeze": {"language": False, "resampler": False}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {**IN_FULL, "model__dtype": "bfloat16"},
        {**IN_FULL, "model__dtype": "bfloat16", "train__optim": "adafactor"},
    ],
    ids=["lora", "in full", "in full, adafactor"],
)
def test_they_take_what_is_asked_for(tmp_path, monkeypatch, changes):
    asked = []
    monkeypatch.setattr(trainer_setup, "check_disk_space", lambda folder, needed, what: asked.append(needed))
    settings = {"train__max_steps": 1, "train__save_total_limit": 2, "evaluate": None}
    run = train(load_recipe(write_recipe(tmp_path, **settings, **changes)), say_nothing)
    kinds = ("*.safetensors", "optimizer.pt")
    written = sum(file.stat().st_size for kind in kinds for file in run.glob(f"checkpoints/step-1/{kind}"))
    (result,) = (folder for folder in (run / "model", run / "adapter") if folder.exists())
    taken = 4 * written + sum(file.stat().st_size for file in result.glob("*.safetensors"))
    # Two are kept, one is written, and one more was asked for by the time alone.
    # Names and shapes of tensors take some room in these small files.
    assert 0.8 * taken < asked[0] < taken
