"""Which evaluation is the best, and what ties are."""

import math

import pytest

from finetune.training.best_checkpoint import describe_ties, is_new_best, metric_key


def history(*evaluations):
    """(score, loss) of steps 10, 20, 30 ..., with logs of the training between them."""
    records = []
    for number, (score, loss) in enumerate(evaluations, start=1):
        records += [
            {"step": 10 * number, "loss": 1.0},
            {"step": 10 * number, "eval_anls": score, "eval_loss": loss},
        ]
    return records


def best_of(evaluations, greater=True):
    best = None
    for number in range(1, len(evaluations) + 1):
        log = history(*evaluations[:number])  # what is known at that step
        if is_new_best(log, 10 * number, best, "eval_anls", greater_is_better=greater):
            best = 10 * number
    return best


@pytest.mark.parametrize(
    ("evaluations", "greater", "best"),
    [
        ([(0.1, 2.0), (0.3, 3.0), (0.2, 1.0)], True, 20),
        ([(0.0, 2.0), (0.0, 1.5), (0.0, 1.8)], True, 20),  # the lower loss
        ([(0.0, 2.0), (0.0, 2.0), (0.0, 2.0)], True, 30),  # the later
        ([(0.5, 2.0), (0.5, math.nan), (0.5, 2.5)], True, 10),
        ([(0.5, math.nan), (0.5, math.nan)], True, 20),
        ([(math.nan, 1.0), (0.0, 3.0), (math.nan, 1.0)], True, 20),
        ([(0.5, 1.0), (0.2, 1.0), (0.2, 1.0), (0.4, 0.1)], False, 30),
        ([(math.nan, 1.0)], True, None),
    ],
)
def test_the_best_evaluation(evaluations, greater, best):
    assert best_of(evaluations, greater) == best


def test_the_loss_itself_has_the_later_of_equal_ones():
    log = [{"step": 10, "eval_loss": 1.0}, {"step": 20, "eval_loss": 1.0}]
    assert is_new_best(log, 20, 10, "eval_loss", greater_is_better=False)


def test_a_best_that_is_not_in_the_log_is_no_best():
    assert is_new_best(history((0.0, 1.0)), 10, 5, "eval_anls", greater_is_better=True)


@pytest.mark.parametrize(
    ("evaluations", "best", "said"),
    [
        ([(0.1, 2.0), (0.3, 3.0)], 20, ""),
        ([(0.0, 2.0), (0.0, 1.5), (0.0, 1.8)], 20, ", tied with steps 10, 30: the lower eval_loss"),
        ([(0.0, 2.0), (0.0, 2.0)], 20, ", tied with step 10: the later"),
        ([(0.0, 2.0)] * 6, 60, ", tied with steps 10, 20, 30, ...: the later"),
    ],
)
def test_ties_are_said(evaluations, best, said):
    assert describe_ties(history(*evaluations), best, "eval_anls") == said


def test_names_of_a_metric():
    assert metric_key("anls") == metric_key("eval_anls") == "eval_anls"
