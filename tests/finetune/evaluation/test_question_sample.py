"""Which questions are drawn of several sources, and what they say of where they are from."""

import pytest
from questions_for_tests import ROWS, source, write

from finetune.errors import UserError
from finetune.evaluation.question_sample import QuestionSample, fair_shares
from finetune.evaluation.questions import Questions
from finetune.evaluation.tasks import find_task


@pytest.fixture
def parts(tmp_path):
    """Three sources of 30, 4 and 9 questions."""
    rows = {
        name: [{**ROWS["docvqa"], "questionId": f"{name}{n}"} for n in range(count)]
        for name, count in (("a", 30), ("b", 4), ("c", 9))
    }
    files = [write(tmp_path, own, f"{name}.jsonl") for name, own in rows.items()]
    return [Questions(source(file), find_task("docvqa")) for file in files]


NAMES = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("sizes", "count", "shares"),
    [
        ([500, 30, 300], 200, [85, 30, 85]),
        ([500, 500, 500], 200, [67, 67, 66]),
        ([4, 600], 200, [4, 196]),
        ([3, 2], 9, [3, 2]),
        ([5, 0, 5], 4, [2, 0, 2]),
        ([7, 7, 7], 2, [1, 1, 0]),
        ([9], 4, [4]),
    ],
)
def test_shares_are_equal_as_far_as_there_are_so_many(sizes, count, shares):
    assert fair_shares(sizes, count) == shares


def test_each_source_has_its_share_and_each_question_its_source(parts):
    asked = QuestionSample(parts, names=NAMES, sample=15, seed=1)
    assert asked.counts == {"a": 6, "b": 4, "c": 5} and len(asked) == 15
    assert str(asked) == "15 of 43 questions (a 6, b 4, c 5)"
    questions = list(asked)
    assert [question.source for question in questions] == ["a"] * 6 + ["b"] * 4 + ["c"] * 5
    assert all(question.id.startswith(question.source) for question in questions)
    assert len({question.id for question in questions}) == 15
    assert list(asked.chosen) == sorted(asked.chosen)


def test_the_seed_draws_and_draws_the_same_again(parts):
    drawn = [QuestionSample(parts, names=NAMES, sample=12, seed=seed).chosen.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    # Not the first ones of each source, and of those within a limit alone.
    assert drawn[0][:4] != [0, 1, 2, 3]
    limited = QuestionSample(parts, names=NAMES, sample=12, limit=32, seed=0)
    assert limited.counts == {"a": 10, "b": 2, "c": 0} and max(limited.chosen) < 32


def test_a_source_alone_is_drawn_as_it_was_before_there_were_several(parts):
    """The numbers that `np.random.default_rng(7).permutation(30)[:5]` gives."""
    asked = QuestionSample(parts[:1], names=["a"], sample=5, seed=7)
    assert asked.chosen.tolist() == [4, 12, 14, 22, 28]
    assert asked.counts == {} and asked[0].source is None and str(asked) == "5 of 30 questions"


def test_without_a_sample_all_are_asked(parts):
    asked = QuestionSample(parts, names=NAMES)
    assert asked.chosen.tolist() == list(range(43)) and str(asked) == "43 questions (a 30, b 4, c 9)"


def test_another_name_is_another_evaluation(parts):
    prints = {QuestionSample(parts, names=names).fingerprint() for names in (NAMES, ["a", "b", "d"])}
    assert len(prints) == 2
    with pytest.raises(UserError, match="two sources are called a"):
        QuestionSample(parts, names=["a", "b", "a"])
