"""The VQA score: every golden case, and the peculiarities of the official normalisation one by one."""

import random

import pytest
from golden_metrics import GOLDEN

from finetune.metrics import normalise_vqa_answer, vqa_score


def test_it_agrees_with_the_published_script():
    ours = [vqa_score(case["prediction"], case["answers"]) for case in GOLDEN["vqa"]]
    assert len(ours) == 60 and len(set(ours)) == 4
    assert ours == pytest.approx([case["score"] for case in GOLDEN["vqa"]], abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Cat", "cat"),
        ("a dog and an owl", "dog and owl"),
        ("Two", "2"),
        ("none", "0"),
        ("twenty two", "twenty 2"),
        ("dont", "don't"),
        ("DIDNT", "didn't"),
        ("couldntve", "couldntve"),  # two apostrophes are missing
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("y'alldve", "y'alldve"),
        ("yall'd've", "y'all'd've"),
        ("ows'at", "ows'at"),
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),  # the official list has it the wrong way round
        ("somebodyd", "somebodyd"),
        ("Im", "im"),  # its capital entries never match
        ("lets", "lets"),
        ("blue-green", "blue green"),
        ("blue -green", "blue green"),  # beside a space the mark just goes
        ("t-shirt - red", "tshirt red"),  # of all its occurrences
        ("1,000", "1000"),
        ("a/b 1,000", "ab 1000"),  # a comma between digits takes the spaces of all marks
        ("red,green", "red green"),
        ("3.", "3"),
        ("3.5", "3.5"),
        ("u.s.a", "usa"),
        ("St. 5", "st 5"),
        (".5", ".5"),
        ("what?", "what"),
        ("it's", "it's"),
        ("100%", "100%"),
        ("a\nb\tc ", "b c"),
        ("the", ""),
        ("." * 33, "."),  # 32 periods at the most
    ],
)
def test_normalisation(answer, normal):
    assert normalise_vqa_answer(answer) == normal


def test_matches_count_over_leave_one_out_sets():
    others = list("qrstuvwxyz")
    for matching, score in [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)]:
        assert vqa_score("owl", ["owl"] * matching + others[matching:]) == pytest.approx(score, abs=1e-12)
    assert vqa_score("owl", ["owl"] * 10) == 1.0


def test_answers_keep_their_articles_and_number_words():
    assert vqa_score("the owl", ["the owl"] * 9 + ["cat"]) == 0.0
    assert vqa_score("two", ["two"] * 9 + ["cat"]) == 0.0
    assert vqa_score("two", ["2"] * 9 + ["cat"]) == 1.0


def test_answers_lose_their_punctuation_only_where_they_differ():
    assert vqa_score("blue-green", ["blue-green"] * 9 + ["cat"]) == 1.0
    assert vqa_score("blue-green", ["blue-green"] * 10) == 0.0
    assert vqa_score("blue-green", ["blue green"] * 10) == 1.0


def test_too_few_answers_are_refused():
    with pytest.raises(ValueError, match="at least 4 people, not 3"):
        vqa_score("owl", ["owl"] * 3)
    with pytest.raises(ValueError, match="not 1"):
        vqa_score("owl", "owlowl")
    assert vqa_score("owl", ["owl"] * 4) == 1.0


def test_scores_are_between_0_and_1_and_do_not_depend_on_the_order():
    rng = random.Random(2)
    for _ in range(200):
        answers = rng.choices(["a-b", "ab", "b", "2", "two", "the b", ""], k=rng.randrange(4, 11))
        prediction = rng.choice(answers)
        score = vqa_score(prediction, answers)
        assert 0 <= score <= 1
        assert vqa_score(prediction, rng.sample(answers, len(answers))) == pytest.approx(score, abs=1e-12)
