"""Bootstrap intervals against what theory says of them."""

from math import sqrt

import numpy as np
import pytest

from finetune.evaluation.bootstrap import difference_interval, score_interval


def mean(values: np.ndarray, groups: np.ndarray | None) -> float:
    return float(values.mean())


def mean_of_groups(values: np.ndarray, groups: np.ndarray) -> float:
    return float(np.mean([values[groups == name].mean() for name in set(groups)]))


def test_the_interval_of_a_mean_is_the_normal_one():
    """For 4,000 right or wrong answers: mean +- 1.96 sqrt(p (1 - p) / n), within a tenth of its width."""
    values = [1.0] * 3000 + [0.0] * 1000
    low, high = score_interval(values, None, mean)
    half = 1.96 * sqrt(0.75 * 0.25 / 4000)
    assert low == pytest.approx(0.75 - half, abs=0.1 * half) and high == pytest.approx(0.75 + half, abs=0.1 * half)


def test_it_covers_the_truth_about_as_often_as_it_says():
    """95% intervals of 200 sets of 100 draws from a distribution of mean 0.5: 95% +- 4 standard errors cover it."""
    draws = np.random.default_rng(1)
    covered = 0
    for number in range(200):
        low, high = score_interval(draws.random(100), None, mean, resamples=200, seed=number)
        covered += low <= 0.5 <= high
    assert 190 - 4 * sqrt(200 * 0.95 * 0.05) <= covered <= 200


def test_pairs_are_drawn_together():
    """Two models that differ by the same amount on every question: the difference is certain, the scores are not."""
    values = np.random.default_rng(2).random(50)
    low, high = difference_interval(values + 0.1, values, None, mean)
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
    low, high = score_interval(values, None, mean)
    assert high - low > 0.1


def test_groups_go_along_with_their_values():
    """A mean of groups of very different size: the small one's uncertainty shows."""
    values, groups = [1.0, 0.0] * 5 + [1.0] * 990, ["human"] * 10 + ["augmented"] * 990
    low, high = score_interval(values, groups, mean_of_groups)
    plain = score_interval(values, groups, mean)
    assert high - low > 5 * (plain.high - plain.low)
    assert low <= mean_of_groups(np.array(values), np.array(groups)) == 0.75 <= high


def test_the_same_seed_gives_the_same_interval_and_another_one_another():
    values = np.random.default_rng(3).random(30)
    assert score_interval(values, None, mean) == score_interval(values, None, mean)
    assert score_interval(values, None, mean) != score_interval(values, None, mean, seed=1)


def test_a_single_question_has_no_width():
    assert score_interval([0.25], None, mean) == (0.25, 0.25)


def test_nothing_to_draw_from_and_unequal_pairs_are_refused():
    with pytest.raises(ValueError, match="no scores"):
        score_interval([], None, mean)
    with pytest.raises(ValueError, match="3 scores cannot be paired with 2"):
        difference_interval([1, 2, 3], [1, 2], None, mean)
