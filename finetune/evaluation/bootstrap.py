"""How far a score can be trusted: percentile bootstrap intervals over the questions.

The questions are resampled with replacement, and the score is computed of each resample; the middle 95% of these
scores are the interval (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13). Questions about the same
page are resampled independently, so where pages have many questions the true uncertainty is somewhat larger.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 0

Aggregate = Callable[[np.ndarray, np.ndarray | None], float]
"""(questions,) scores, (questions,) groups or None -> the task's score."""

Groups = Sequence[str | None] | np.ndarray
"""(questions,) the group of each question, None for one without."""


class Interval(NamedTuple):
    """From `low` to `high`, in the score's own unit."""

    low: float
    high: float


def score_interval(
    values: Sequence[float],
    groups: Groups | None,
    aggregate: Aggregate,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """The interval of a score.

    Args:
        values: (questions,) the score of each.
        groups: (questions,) the group of each; None where there are none.
        aggregate: computes the task's score from them.

    Raises:
        ValueError: no values.
    """
    return _interval(values, groups, lambda scores, names: aggregate(scores[0], names), resamples, seed)


def difference_interval(
    values: Sequence[float],
    compared: Sequence[float],
    groups: Groups | None,
    aggregate: Aggregate,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """The interval of the difference between two models' scores on the same questions, `values` minus `compared`.

    Each resample has the same questions for both, so what makes a question hard or easy for both cancels out.

    Raises:
        ValueError: no values, or two different numbers of them.
    """
    if len(values) != len(compared):
        raise ValueError(f"{len(values)} scores cannot be paired with {len(compared)}")
    return _interval(
        [values, compared],
        groups,
        lambda scores, names: aggregate(scores[0], names) - aggregate(scores[1], names),
        resamples,
        seed,
    )


def _interval(
    values: Sequence[float] | Sequence[Sequence[float]],
    groups: Groups | None,
    statistic: Callable[[np.ndarray, np.ndarray | None], float],
    resamples: int,
    seed: int,
) -> Interval:
    """The interval of a statistic of (models, questions) scores and (questions,) groups."""
    scores = np.atleast_2d(np.asarray(values, dtype=np.float64))
    count = scores.shape[1]
    if not count:
        raise ValueError("there are no scores to resample")
    names = None if groups is None else np.asarray(groups, dtype=object)
    generator = np.random.default_rng(seed)
    statistics = np.empty(resamples)
    for number in range(resamples):
        chosen = generator.integers(0, count, count)
        statistics[number] = statistic(scores[:, chosen], None if names is None else names[chosen])
    low, high = np.quantile(statistics, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))
