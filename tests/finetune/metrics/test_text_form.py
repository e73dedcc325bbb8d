"""Texts in different code points: the same word is the same answer, for every metric."""

import time
import unicodedata

import pytest

from finetune.metrics import anls, cider_d, exact_match, ptb_tokens, relaxed_accuracy, vqa_score
from finetune.metrics.text_form import LONGEST_RUN, composed

WORDS = ["café", "Nguyễn Huệ", "한국어", "が", "Ångström"]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_the_same_word_is_right_in_both_forms(word, forms):
    gold, reply = (unicodedata.normalize(form, word) for form in forms)
    assert gold != reply
    assert anls(reply, [gold]) == exact_match(reply.upper(), [gold]) == relaxed_accuracy(reply, gold) == 1.0
    assert relaxed_accuracy(reply, gold, published_order=True) == 1.0
    assert vqa_score(reply, [gold.lower()] * 4) == vqa_score(reply, [gold.lower()] * 9 + ["x"]) == 1.0
    others = [ptb_tokens("a dog runs"), ptb_tokens("two cats")]
    captions = [ptb_tokens(f"one {gold} here"), *others]
    same = cider_d([captions[0], *others], [[caption] for caption in captions])
    assert cider_d([ptb_tokens(f"one {reply} here"), *others], [[caption] for caption in captions]) == same


def test_the_length_of_anls_is_that_of_the_composed_text():
    """`é` counts once: one wrong letter of four is a distance of a quarter in either form."""
    assert anls("cafe", ["caf\u00e9"]) == anls("cafe", ["cafe\u0301"]) == 0.75


def test_compatible_forms_are_told_apart_unless_asked_for():
    assert composed("Ｂ") == "Ｂ" and composed("Ｂ", "NFKC") == "B"
    assert exact_match("Ｂ", ["B"]) == 0.0


def test_a_long_run_of_marks_is_left_alone():
    marks = "\u0301\u0323"
    longest = "e" + marks * (LONGEST_RUN // 2)
    assert composed(longest) == unicodedata.normalize("NFC", longest)
    assert composed(longest + marks) == longest + marks
    started = time.process_time()
    composed("e" + marks * 200_000)
    assert time.process_time() - started < 10  # sorting them would take minutes
