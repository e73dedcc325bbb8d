"""ANLS, relaxed accuracy, exact match: every golden case, and the edges that these do not reach."""

import random

import pytest
from golden_metrics import GOLDEN

from finetune.metrics import anls, exact_match, relaxed_accuracy


def test_anls_agrees_with_the_published_script():
    ours = [anls(case["prediction"], case["answers"]) for case in GOLDEN["anls"]]
    assert len(ours) == 60
    assert ours == pytest.approx([case["anls"] for case in GOLDEN["anls"]], abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("ab", ["aX"], 0.5),  # exactly one half counts
        ("abc", ["aXX"], 0.0),
        ("  Total \n COST ", ["total cost"], 1.0),
        ("$ 12.40", ["12.40", "$12.40"], 6 / 7),  # the best answer: one letter too many of seven
        ("", ["a"], 0.0),
        ("", [""], 1.0),
        # The length is that of the raw text: two letters wrong of ten, six of which are spaces.
        ("ab      xy", ["abcd"], 0.7),
        ("abcd", ["abdc"], 0.5),  # two edits: a swap is not one
        ("ba", ["ab"], 0.0),
    ],
)
def test_anls_edges(prediction, answers, score):
    assert anls(prediction, answers) == pytest.approx(score, abs=1e-12)


def test_anls_is_between_0_and_1_and_1_for_the_answer_itself():
    rng = random.Random(1)
    for _ in range(300):
        a, b = ("".join(rng.choices("ab İ\n", k=rng.randrange(8))) for _ in range(2))
        assert anls(a, [a, b]) == 1.0
        score = anls(a, [b])
        assert score == 0 or 0.5 <= score <= 1
        assert anls(a, [b, "zzz"]) >= score
        assert score == anls(b, [a])


def test_relaxed_accuracy_agrees_with_the_published_script_in_both_orders():
    cases = GOLDEN["relaxed"]
    assert len(cases) == 60
    for case in cases:
        given = case["prediction"], case["gold"]
        assert relaxed_accuracy(*given) == float(case["relative_to_gold"]), case
        assert relaxed_accuracy(*given, published_order=True) == float(case["published_argument_order"]), case
    assert any(case["relative_to_gold"] != case["published_argument_order"] for case in cases)


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("105", "100", 1.0),
        ("95", "100", 1.0),
        ("105.1", "100", 0.0),
        ("-104", "-100", 1.0),
        ("104", "-100", 0.0),
        ("12%", "0.12", 1.0),
        ("0.125", "12%", 1.0),
        ("12", "12%", 0.0),
        ("0.0", "0", 0.0),
        ("0", "0", 1.0),
        ("1e3", "1000", 1.0),
        ("1,000", "1000", 0.0),
        (" No ", "no", 1.0),
        ("noo", "no", 0.0),
        ("inf", "inf", 1.0),
        ("nan", "NaN", 1.0),
        ("inf", "3", 0.0),
    ],
)
def test_relaxed_accuracy_edges(prediction, gold, score):
    assert relaxed_accuracy(prediction, gold) == score


def test_the_published_order_measures_against_the_prediction():
    assert relaxed_accuracy("56", "53.2") == 0.0  # 5.26 % of 53.2
    assert relaxed_accuracy("56", "53.2", published_order=True) == 1.0  # 5 % of 56
    assert relaxed_accuracy("0", "0.0", published_order=True) == 0.0


def test_exact_match_looks_at_neither_case_nor_surrounding_space():
    assert exact_match(" Yes\n", ["no", "YES "]) == 1.0
    assert exact_match("yes.", ["yes"]) == 0.0
    assert exact_match("new  york", ["new york"]) == 0.0


@pytest.mark.parametrize("metric", [anls, exact_match])
@pytest.mark.parametrize("answers", [[], "a text"])
def test_answers_must_be_a_list_with_something_in_it(metric, answers):
    with pytest.raises(ValueError, match="answers must be a list of at least one text"):
        metric("a", answers)
