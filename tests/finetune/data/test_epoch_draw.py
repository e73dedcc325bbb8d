"""What epochs draw by the weights of sources: exact over the epochs, every row as often as any other, one size."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from recipes_for_tests import write_recipe

from finetune.data.epoch_draw import EpochDraws, epochs_of
from finetune.recipe import load_recipe
from finetune.training.epoch_sampler import EpochSampler


def draws(*sources, seed=0):
    """Sources as (rows, weight); sample 10 * i is the i-th row of all."""
    source = np.repeat(np.arange(len(sources)), [rows for rows, _ in sources])
    return EpochDraws(10 * np.arange(len(source)), source, [weight for _, weight in sources], seed)


def counts(drawn: EpochDraws, epochs: int) -> np.ndarray:
    """(epochs, samples), how often each epoch draws each sample."""
    made = np.zeros((epochs, len(drawn._kept)), int)
    for epoch in range(epochs):
        np.add.at(made[epoch], drawn.indices(epoch) // 10, 1)
    return made


@pytest.mark.parametrize(
    ("sources", "size"),
    [
        ([(4, 0.1)], 1),
        ([(3, 1.0), (4, 0.1)], 4),
        ([(5, 0.5)], 3),
        ([(10, 1.1)], 11),  # not 12, though 1.1 * 10 is more than 11 in floating point
        ([(4, 1.0), (4, 2.5), (6, 0.5)], 17),
        ([(7, 0.3), (7, 0.3), (7, 0.4)], 7),
        ([(1, 0.9), (1, 0.2)], 2),
        ([(100, 0.25), (1000, 0.07), (3, 3.0)], 104),
    ],
)
def test_weights_hold_over_epochs(sources, size):
    epochs = 400
    drawn = draws(*sources)
    made = counts(drawn, epochs)
    assert drawn.size == size and (made.sum(axis=1) == size).all()
    starts = np.cumsum([0, *(rows for rows, _ in sources)])
    by_source = np.add.reduceat(made, starts[:-1], axis=1)
    exact = [Fraction(repr(weight)) * rows for rows, weight in sources]
    for number, (_, weight) in enumerate(sources):
        expected = float(exact[number] / sum(exact)) * size * epochs
        assert by_source[:, number].sum() == pytest.approx(expected, abs=6)
        each = made[:, starts[number] : starts[number + 1]]
        assert each.min() >= int(weight)
        assert np.ptp(each.sum(axis=0)) <= 1, "each row as often as the others"
        assert np.ptp(by_source[:, number]) <= 1


def test_the_case_of_a_tenth_of_four_rows():
    made = counts(draws((3, 1.0), (4, 0.1)), 100)
    assert (made[:, :3] >= 1).all()
    some = made[:, 3:].sum(axis=1)
    assert set(some) == {0, 1} and some.sum() == pytest.approx(47, abs=2)  # 0.4 and its part of the missing 0.6


def test_halves_differ_from_epoch_to_epoch():
    made = counts(draws((8, 0.5)), 6)
    for first, second in zip(made[0::2], made[1::2], strict=True):
        assert (first + second == 1).all(), "the other half"
    assert (made[0] != made[2]).any()
    twice = counts(draws((4, 2.5)), 8)
    assert set(np.unique(twice)) == {2, 3} and (twice.sum(axis=1) == 10).all()


def test_an_epoch_has_no_row_twice_while_another_waits():
    assert counts(draws((7, 0.6)), 50).max() == 1


def test_epochs_are_the_same_in_any_order_and_by_the_seed():
    once = draws((9, 0.4), (5, 1.5), seed=3)
    forward = [once.indices(epoch).tolist() for epoch in range(6)]
    assert all(one == sorted(one) for one in forward)
    assert [draws((9, 0.4), (5, 1.5), seed=3).indices(epoch).tolist() for epoch in (5, 2, 0)] == [
        forward[epoch] for epoch in (5, 2, 0)
    ]
    assert once.indices(4).tolist() == forward[4]
    assert len({tuple(draws((9, 0.4), seed=seed).indices(0)) for seed in range(9)}) > 1


def test_what_is_used():
    drawn = draws((4, 0.5), (3, 1.0), (2, 0.0))
    assert drawn.used().tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert drawn.used(1).tolist() == sorted(set(drawn.indices(0).tolist()))
    assert len(drawn.used(1)) == 5 and drawn.used(2).tolist() == drawn.used().tolist()


def test_the_order_of_an_epoch():
    drawn = draws((4, 0.5), (3, 1.0))
    samples = drawn.used().tolist()
    sampler = EpochSampler(drawn, samples, seed=1, shuffle=True)
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        orders.append([samples[place] for place in sampler])
        assert Counter(orders[-1]) == Counter(drawn.indices(epoch).tolist()) and len(sampler) == 5
    sampler.set_epoch(2)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert [samples[place] for place in sampler] == orders[2]
    assert any(order != sorted(order) for order in orders)
    plain = EpochSampler(drawn, samples, seed=1, shuffle=False)
    assert [samples[place] for place in plain] == drawn.indices(0).tolist()


@pytest.mark.parametrize(
    ("overrides", "epochs"), [(["train.max_steps=-1", "train.num_train_epochs=2.5"], 3), (["train.max_steps=9"], 5)]
)
def test_the_epochs_of_a_run(tmp_path, overrides, epochs):
    batch = ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2"]
    assert epochs_of(load_recipe(write_recipe(tmp_path), [*overrides, *batch]), 10, 1) == epochs
