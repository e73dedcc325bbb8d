"""Epochs counted before training, as the trainer counts them; and bars of how lengths are spread."""

import numpy as np
import pytest
from recipes_for_tests import write_recipe

from finetune.batches.budget import packing_budget
from finetune.batches.packing import pack
from finetune.check.epoch_estimate import estimate_epoch
from finetune.check.histogram import bars, histogram_chart, make_histogram
from finetune.data.checks.checked import Checked
from finetune.recipe import load_recipe


def checked(lengths, weight=1.0):
    count = len(lengths)
    ones, source = np.ones(count, np.int64), np.zeros(count, np.int64)
    return Checked(np.arange(count) * 2, np.array(lengths), ones, ones * 3, source, [weight], [], 0, [], [])


def estimate(tmp_path, lengths, *overrides, weight=1.0):
    overrides = ["train.max_steps=-1", "data.max_length=1000", *overrides]
    recipe = load_recipe(write_recipe(tmp_path), overrides)
    return estimate_epoch(recipe, checked(lengths, weight), packing_budget(recipe.data, np.array(lengths)))


@pytest.mark.parametrize(
    ("overrides", "steps", "all_steps"),
    [
        (["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=4"], 3, 9),
        (["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=1"], 21, 63),
        (["train.per_device_train_batch_size=64"], 1, 3),
        (["train.gradient_accumulation_steps=4", "train.num_train_epochs=1.5"], 6, 9),
        (["train.gradient_accumulation_steps=4", "train.max_steps=5"], 6, 5),
        (["train.per_device_train_batch_size=2", "train.dataloader_drop_last=true"], 3, 9),
    ],
)
def test_steps(tmp_path, overrides, steps, all_steps):
    epoch = estimate(tmp_path, [100] * 21, *overrides)
    assert (epoch.steps, epoch.all_steps) == (steps, all_steps)
    assert (epoch.samples, epoch.tokens, epoch.supervised) == (21, 2100, 63)


def test_weights_and_processes_count(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    epoch = estimate(tmp_path, [100] * 21, "train.gradient_accumulation_steps=2", weight=2.0)
    assert (epoch.samples, epoch.tokens) == (42, 4200)
    assert epoch.samples_per_step == 8 and epoch.steps == 6


def test_forwards_are_those_of_the_packs(tmp_path):
    lengths = [400] * 16
    overrides = ["train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=2"]
    packed = estimate(tmp_path, lengths, *overrides)
    assert packed.budget == 1000
    assert len(pack(lengths[:4], 1000)) == 2
    assert packed.packs_per_step == 4.0 and packed.fill == pytest.approx(0.8)
    alone = estimate(tmp_path, lengths, *overrides, "data.packing=false")
    assert alone.packs_per_step == 8.0 and alone.budget is alone.fill is None


def test_the_budget_is_the_trainers(tmp_path):
    lengths = np.array([10, 300])

    def budget(*overrides):
        return packing_budget(load_recipe(write_recipe(tmp_path), overrides).data, lengths)

    assert budget("data.max_length=1000") == 1000
    assert budget("data.max_length=1000", "data.tokens_per_batch=4000") == 4000
    assert budget("data.max_length=null") == 300
    assert budget("data.packing=false") is None


@pytest.mark.parametrize("values", [[0], [7] * 5, [258, 600], [0, 1, 2, 3], [5, 2047, 2048], range(100_000)])
def test_every_value_is_in_its_bin(values):
    values = np.array(values)
    histogram = make_histogram(values)
    assert 1 <= len(histogram.counts) <= 12
    assert histogram.counts[0] and histogram.counts[-1] and sum(histogram.counts) == len(values)
    assert str(histogram.width)[0] in "125" and set(str(histogram.width)[1:]) <= {"0"}
    for number, count in enumerate(histogram.counts):
        low = histogram.first + number * histogram.width
        assert count == ((values >= low) & (values < low + histogram.width)).sum()


def test_bars_show_what_is_rare():
    shown = list(bars(make_histogram(np.array([1] * 1000 + [3])), width=20))
    assert shown == [("1", "█" * 20, "1,000"), ("2", "", "    0"), ("3", "█", "    1")]
    labels = [label for label, _, _ in bars(make_histogram(np.array([90, 1200])))]
    assert labels[0] == "      0-199" and labels[-1] == "1,200-1,399"


def test_the_chart_has_a_bar_for_each_bin():
    chart = histogram_chart("Length <b>", make_histogram(np.array([0, 1, 1, 4])), unit="tokens")
    assert chart.count("<rect") == 5 and "Length &lt;b&gt;" in chart
    assert "<title>1 tokens: 2</title>" in chart
