"""Weights of sources in training: each epoch draws, and a resumed run goes on with the draws that it began with."""

import json
import signal

import pytest
from recipes_for_tests import write_recipe, write_rows
from said import collect

from finetune.errors import Interrupted
from finetune.recipe import load_recipe
from finetune.training.interrupts import StopOnSignal
from finetune.training.run_record import EACH_EPOCH, ONCE, WEIGHTS
from finetune.training.train import train
from finetune.training.trainer import QwenVLTrainer

# 3 rows, and 4 of which an epoch draws 1.6: 5 samples an epoch, 3 steps, 4 epochs.
SETTINGS = {
    "train__max_steps": 12,
    "train__per_device_train_batch_size": 1,
    "train__gradient_accumulation_steps": 2,
    "train__save_steps": 1,
    "train__learning_rate": 1e-3,
}


def recipe(folder, **changes):
    file = write_recipe(folder, **SETTINGS, **changes)
    write_rows(folder / "train.jsonl", 3)
    write_rows(folder / "more.jsonl", 4, first=7)
    sources = [
        {"path": str(folder / name), "format": "messages", "weight": weight}
        for name, weight in (("train.jsonl", 1.0), ("more.jsonl", 0.4))
    ]
    return load_recipe(file, [f"data.train={json.dumps(sources)}"])


@pytest.fixture
def seen(monkeypatch):
    """The samples of each batch, as they are trained."""
    batches = []
    step = QwenVLTrainer.training_step

    def look(self, model, inputs, *args, **kwargs):
        batches.append(inputs["samples"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(QwenVLTrainer, "training_step", look)
    return batches


def stopped_at(step, monkeypatch, made):
    with monkeypatch.context() as patch:
        step_end = StopOnSignal.on_step_end

        def stop(self, args, state, control, **kwargs):
            if state.global_step == step:
                self.received = signal.SIGTERM
            return step_end(self, args, state, control, **kwargs)

        patch.setattr(StopOnSignal, "on_step_end", stop)
        with pytest.raises(Interrupted):
            run(made)


def run(made):
    said = []
    return train(made, say=collect(said)), said


def weights_of(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


# Within the second epoch, and at its end.
@pytest.mark.parametrize("step", [5, pytest.param(6, marks=pytest.mark.slow)])
def test_each_epoch_draws_and_a_resume_goes_on_bit_for_bit(tmp_path, seen, monkeypatch, step):
    whole, said = run(recipe(tmp_path / "whole"))
    order = [sample for batch in seen for sample in batch]
    epochs = [order[start : start + 5] for start in range(0, 20, 5)]
    assert len(order) == 20 and all({0, 1, 2} <= set(epoch) for epoch in epochs)
    assert len({tuple(sorted(epoch)) for epoch in epochs}) > 1 and {3, 4, 5, 6} <= set(order)
    assert any("4 of 4" in line and "x 0.4 = 1.6 an epoch" in line for line in said)
    assert any("each epoch draws 5 samples, other rows" in line for line in said)
    assert json.loads((whole / "run.json").read_text())[WEIGHTS] == EACH_EPOCH
    seen.clear()
    stopping = recipe(tmp_path / "stopped")
    stopped_at(step, monkeypatch, stopping)
    again, _ = run(stopping)
    assert [sample for batch in seen for sample in batch] == order
    assert weights_of(again) == weights_of(whole)


def test_a_run_that_drew_once_goes_on_with_that(tmp_path, seen, monkeypatch):
    """As its run.json was written before there was another way, and before its recipe had all keys of today."""
    made = recipe(tmp_path / "old")
    stopped_at(4, monkeypatch, made)
    file = tmp_path / "old" / "run" / "run.json"
    stored = json.loads(file.read_text())
    del stored[WEIGHTS], stored["identity"]["recipe"]["data"]["box_edge"]
    file.write_text(json.dumps(stored))
    seen.clear()
    folder, said = run(made)
    assert any("drew its samples once for all epochs" in line for line in said)
    order = [sample for batch in seen for sample in batch]
    drawn = sorted(order[-5:])
    assert drawn[:3] == [0, 1, 2] and sorted(order[-10:-5]) == drawn, "the same rows in each epoch"
    assert json.loads((folder / "run.json").read_text())[WEIGHTS] == ONCE
