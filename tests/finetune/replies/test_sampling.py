"""Tokens are drawn as their probabilities say, the same ones for the same seed."""

import random
from collections import Counter

import pytest
import torch

from finetune.errors import Failed
from finetune.replies.sampling import Sampling, choose, draw

LOGITS = torch.tensor([2.0, -1.0, 0.5, -torch.inf, 1.5])


def one(logits: torch.Tensor, sampling: Sampling, uniform: float) -> int:
    return draw(logits[None], [sampling], [uniform])[0]


@pytest.mark.parametrize(
    ("temperature", "top_p", "kept"), [(1.0, 1.0, 4), (0.5, 1.0, 4), (2.0, 0.9, 3), (1.0, 0.6, 2), (1.0, 1e-9, 1)]
)
def test_draws_have_the_probabilities(temperature, top_p, kept):
    expected = (LOGITS.double() / temperature).softmax(-1)
    likely = expected.argsort(descending=True)[:kept]
    sums = expected[likely].cumsum(-1)
    assert sums[-1] >= top_p - 1e-9 and (kept == 1 or sums[-2] < top_p)
    expected = {int(token): float(expected[token] / sums[-1]) for token in likely}
    dice, count = random.Random(0), 4000
    found = Counter(one(LOGITS, Sampling(temperature, top_p), dice.random()) for _ in range(count))
    assert found.keys() == expected.keys()
    for token, probability in expected.items():  # within four standard deviations
        assert abs(found[token] / count - probability) < 4 * (probability * (1 - probability) / count) ** 0.5 + 1e-9


def test_the_ends_of_the_range():
    for top_p in (1.0, 0.99):
        first, last = (one(LOGITS, Sampling(1.0, top_p), uniform) for uniform in (0.0, 1 - 2**-53))
        assert {first, last} <= {0, 1, 2, 4}
    impossible_last = torch.tensor([0.0, -torch.inf])
    assert one(impossible_last, Sampling(1.0), 1 - 2**-53) == 0
    flat = torch.zeros(5000)
    assert one(flat, Sampling(1.0, 0.999), 1 - 2**-53) < 5000  # more than are looked at first


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.0), (5e-324, 1.0), (5e-324, 0.5), (1e-300, 0.0)])
def test_the_least_that_can_be_asked_is_the_likeliest(temperature, top_p):
    for logits in (LOGITS, LOGITS - 100, torch.arange(5000).roll(7) / 5000):
        for uniform in (0.0, 0.5, 1 - 2**-53):
            assert one(logits, Sampling(temperature, top_p), uniform) == int(logits.argmax())


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, 0.5)])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_choose_nothing(sampling, wrong):
    logits = torch.stack([LOGITS, LOGITS])
    logits[1, 2] = wrong
    with pytest.raises(Failed, match="infinite or not a number"):
        choose(logits, [sampling] * 2, [random.Random(0), random.Random(1)])


def test_rows_choose_each_in_its_own_way():
    """Greedy rows take no draws; a row's token does not depend on the others'."""
    rows = [Sampling(), Sampling(1.0), Sampling(1.5, 0.8)]
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS.roll(2)])
    for seed in range(20):
        together = choose(logits, rows, [random.Random(seed) for _ in rows])
        alone = [choose(logits[n : n + 1], rows[n : n + 1], [random.Random(seed)])[0] for n in range(3)]
        assert together == alone and together[0] == 0
    dice = random.Random(3)
    choose(logits[:1], rows[:1], [dice])
    assert dice.random() == random.Random(3).random()


def test_several_replies_have_seeds_of_their_own():
    seeds = [Sampling(1.0, seed=7).nth(index).seed for index in range(50)]
    assert seeds[0] == 7 and len(set(seeds)) == 50
    assert seeds == [Sampling(1.0, seed=7).nth(index).seed for index in range(50)]
    assert Sampling(1.0, seed=8).nth(1).seed not in seeds
    assert Sampling(1.0).nth(3).seed is None
