"""Which option a reply chose."""

import pytest

from finetune.metrics import choice_letter, multiple_choice_accuracy

OPTIONS = ["A dog", "cat", "the owl", "B"]


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        (" b\n", "B"),
        ("(C)", "C"),
        ("B. cat", "B"),
        ("B) cat", "B"),
        ("**B**: cat", "B"),
        ("C: because", "C"),
        ("The answer is C.", "C"),
        ("Answer: (D)", "D"),
        ("the correct option is B, cat", "B"),
        ("B\ncat", "B"),
        ("A dog", None),  # an article
        ("Dogs", None),
        ("E", None),  # no such option
        ("I think so", None),
        ("the answer is a dog", None),
        ("the answer is b.", "B"),
        ("ANSWER: B the cat", "B"),
        ("the answer isn't known", None),
        ("", None),
        ("?", None),
    ],
)
def test_the_letter_of_a_reply(reply, letter):
    assert choice_letter(reply, 4) == letter


@pytest.mark.parametrize(
    ("reply", "gold", "score"),
    [
        ("A", "A", 1.0),
        ("a dog.", "A", 1.0),  # by its text
        ("A dog", "B", 0.0),
        ("The Owl", "C", 1.0),
        ("B. cat", "B", 1.0),
        ("B", "D", 1.0),  # which is the text of the last option
        ("B", "B", 0.0),
        ("none of them", "A", 0.0),
    ],
)
def test_the_right_option_by_letter_or_text(reply, gold, score):
    assert multiple_choice_accuracy(reply, gold, OPTIONS) == score


def test_the_gold_letter_must_be_an_option():
    with pytest.raises(ValueError, match="gold must be one of ABCD, not 'E'"):
        multiple_choice_accuracy("A", "E", OPTIONS)
    with pytest.raises(ValueError, match="gold must be one of ABCD, not ''"):
        multiple_choice_accuracy("A", "", OPTIONS)
