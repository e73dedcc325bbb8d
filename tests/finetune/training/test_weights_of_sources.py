"""Weights of sources in training: each epoch draws, and a resumed run goes on with the draws that it began with."""

import json
import os
import signal
from collections import Counter

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from recipes_for_tests import finetune, write_recipe, write_rows
from said import collect
from torch.utils.data import BatchSampler

from finetune.check.check import check
from finetune.data.epoch_draw import EpochDraws
from finetune.errors import Interrupted
from finetune.recipe import load_recipe
from finetune.training.epoch_sampler import EpochSampler
from finetune.training.interrupts import StopOnSignal
from finetune.training.train import train
from finetune.training.trainer import QwenVLTrainer
from finetune.training.training_data import EACH_EPOCH, ONCE, WEIGHTS

# 3 rows, and 4 of which an epoch draws 1.6: 5 samples an epoch, 3 steps, 4 epochs.
SETTINGS = {
    "train__max_steps": 12,
    "train__per_device_train_batch_size": 1,
    "train__gradient_accumulation_steps": 2,
    "train__save_steps": 1,
    "train__learning_rate": 1e-3,
}


def recipe(folder, **changes):
    file = write_recipe(folder, **SETTINGS | changes)
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
        samples = inputs["samples"].tolist()
        loss = step(self, model, inputs, *args, **kwargs)
        batches.append(samples)  # not those of a step that was abandoned
        return loss

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


@pytest.mark.parametrize(("processes", "batch"), [(2, 1), (3, 1), (2, 2), (4, 3)])
def test_processes_share_the_draw_of_an_epoch(processes, batch):
    """As Accelerate shares out batches: all of the draw once, and what makes the shares equally long again."""
    draws = EpochDraws(np.arange(40), np.repeat([0, 1], [12, 28]), [1.0, 0.4], 7)
    samples = draws.used().tolist()
    for epoch in (0, 3):
        shares = []
        for process in range(processes):
            sampler = EpochSampler(draws, samples, seed=7, shuffle=True)  # each process has its own
            sampler.set_epoch(epoch)
            batches = BatchSampler(sampler, batch, drop_last=False)
            shares.append([samples[one] for each in BatchSamplerShard(batches, processes, process) for one in each])
        assert len({len(share) for share in shares}) == 1
        seen = Counter(sample for share in shares for sample in share)
        drawn = Counter(draws.indices(epoch).tolist())
        assert not drawn - seen and (seen - drawn).total() < processes * batch


def test_check_says_what_the_run_says(tmp_path, capsys, seen):
    made = recipe(tmp_path)
    _, said = run(made.model_copy(update={"train": made.train.model_copy(update={"max_steps": 1})}))
    check(made, samples=0)
    lines = [" ".join(line.split()) for line in said]
    told = [line for line in lines if " an epoch" in line or "each epoch draws" in line]
    checked = " ".join(capsys.readouterr().out.split())
    assert len(told) == 2 and all(line in checked for line in told)


def losses_of(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.slow
def test_packs_do_not_change_what_is_drawn(tmp_path, seen):
    """Five samples an epoch, two a batch: the last one of an epoch has one."""
    settings = {"train__per_device_train_batch_size": 2, "train__gradient_accumulation_steps": 1}
    settings |= {"train__max_steps": 4, "adapter__dropout": 0.0, "train__save_steps": 4}
    folders, orders = [], []
    for name, packing in (("packed", True), ("single", False)):
        seen.clear()
        folder, _ = run(recipe(tmp_path / name, **settings, data__packing=packing))
        folders.append(folder)
        orders.append([*seen])
    assert orders[0] == orders[1] and [len(batch) for batch in orders[0]] == [2, 2, 1, 2]
    assert losses_of(folders[0]) == pytest.approx(losses_of(folders[1]), abs=1e-4)


@pytest.mark.slow
def test_two_processes_draw_what_one_does(tmp_path):
    """Four samples an epoch: two steps, of which each process has a half."""
    settings = {"data__shuffle": False, "adapter__dropout": 0.0, "train__max_steps": 5, "train__save_strategy": "no"}
    files = []
    for name, accumulation in (("one", 2), ("two", 1)):
        more = {**SETTINGS, **settings, "train__gradient_accumulation_steps": accumulation}
        file = write_recipe(tmp_path / name, **more)
        write_rows(tmp_path / name / "train.jsonl", 3)
        write_rows(tmp_path / name / "more.jsonl", 4, first=7)
        sources = [
            {"path": str(tmp_path / name / rows), "format": "messages", "weight": weight}
            for rows, weight in (("train.jsonl", 1.0), ("more.jsonl", 0.25))
        ]
        files.append((file, f"data.train={json.dumps(sources)}"))
    port = str(20000 + os.getpid() % 20000)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port)
    finetune(*files[0], env={**os.environ, "OMP_NUM_THREADS": "1"})
    finetune(*files[1], env={**os.environ, "OMP_NUM_THREADS": "1"}, launcher=launcher)
    losses = [losses_of(tmp_path / name / "run") for name in ("one", "two")]
    assert len(losses[0]) == 5 and losses[0] == pytest.approx(losses[1], abs=1e-4)
