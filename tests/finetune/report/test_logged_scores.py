"""Which logged keys are scores, and of what."""

from typing import get_args

import pytest

from finetune.recipe.sections import MetricName
from finetune.report.logged_scores import is_score, parts_of_scores


def test_what_counts_as_a_score():
    assert is_score("eval_loss") and is_score("eval_anls") and is_score("eval_docvqa_loss")
    for key in ("loss", "eval_runtime", "eval_samples_per_second", "eval_seconds", "eval_long_samples"):
        assert not is_score(key)


@pytest.mark.parametrize("name", ["invoice_samples", "images", "per_second", "loss", "total 总"])
def test_a_part_has_a_score_whatever_it_is_called(name):
    for metric in get_args(MetricName):
        assert is_score(f"eval_{metric}_{name}")
        keys = [f"eval_{metric}_{name}", "eval_seconds", f"eval_{metric}"]
        assert parts_of_scores(keys) == {f"eval_{metric}": {f"eval_{metric}_{name}": name}}


def test_parts_come_with_their_whole_in_the_order_of_the_keys():
    keys = ["step", "eval_loss", "eval_anls", "eval_anls_b", "eval_samples", "eval_anls_a", "eval_anls_x", "eval_anls"]
    assert parts_of_scores(keys) == {
        "eval_loss": {},
        "eval_anls": {"eval_anls_b": "b", "eval_anls_a": "a", "eval_anls_x": "x"},
    }


def test_a_part_without_its_whole_stands_by_itself():
    assert parts_of_scores(["eval_anls_b", "eval_loss_x"]) == {"eval_anls_b": {}, "eval_loss_x": {}}
