"""CIDEr-D against pycocoevalcap, and by hand; the tokens it compares."""

import math
import random

import pytest
from golden_metrics import GOLDEN

from finetune.metrics import cider_d, ptb_tokens


def golden_captions():
    given = GOLDEN["cider_d"]
    predictions, references = given["tokenised_predictions"], given["tokenised_references"]
    images = list(references)
    return [predictions[image] for image in images], [references[image] for image in images]


def test_it_agrees_with_the_published_code():
    mean, scores = cider_d(*golden_captions())
    assert mean == pytest.approx(GOLDEN["cider_d"]["corpus"], abs=1e-4)
    assert scores == pytest.approx(GOLDEN["cider_d"]["per_item"], abs=1e-4)
    assert len(scores) == 12


def test_a_caption_that_is_the_only_reference_scores_10():
    captions = ["one two three four", "five six seven eight"]
    assert cider_d(captions, [[caption] for caption in captions])[1] == pytest.approx([10, 10])


def test_a_score_by_hand():
    # Each n-gram is in the references of one image of two, so all weigh log 2 and cosines are those of counts.
    references = [["a b"], ["x y"]]
    _, [score, other] = cider_d(["a c", "x"], references)
    # Words: (1 of 2 shared) / (|(1, 1)| |(1, 1)|), but "c" is in no reference and weighs log 2 as well.
    assert score == pytest.approx(10 * (1 / 2) / 4)
    # One word has no pair, the reference one: lengths differ by 1.
    assert other == pytest.approx(10 * (1 / math.sqrt(2)) / 4 * math.exp(-1 / 72))


def test_repeating_a_word_counts_no_more_than_the_reference_has_it():
    references = [["dog runs"], ["cat sleeps"]]
    once = cider_d(["dog runs", ""], references)[0]
    often = cider_d(["dog dog dog dog dog runs", ""], references)[0]
    assert often < once


def test_words_that_all_images_have_are_worth_nothing():
    references = [["a dog"], ["a cat"], ["a bird"]]
    assert cider_d(["a", "a", "a"], references) == (0.0, [0.0, 0.0, 0.0])
    assert cider_d(["a dog"], [["a dog"]]) == (0.0, [0.0])  # a single image: nothing in it is rare


def test_the_order_of_images_and_references_does_not_matter():
    predictions, references = golden_captions()
    mean, scores = cider_d(predictions, references)
    order = random.Random(4).sample(range(12), 12)
    shuffled = cider_d([predictions[i] for i in order], [references[i][::-1] for i in order])
    assert shuffled[0] == pytest.approx(mean, abs=1e-12)
    assert shuffled[1] == pytest.approx([scores[i] for i in order], abs=1e-12)
    assert all(0 <= score <= 10 for score in scores)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "no captions"),
        (["a"], [], "1 predictions for the references of 0 images"),
        (["a", "b"], [["a"], []], "image 1: references must be a list"),
        (["a"], ["a caption"], "image 0: references must be a list"),
    ],
)
def test_what_cannot_be_scored_is_named(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        cider_d(predictions, references)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man isn't riding the dog's bike.", "a man is n't riding the dog 's bike"),
        ("They can't, won't; cannot!", "they ca n't wo n't can not"),
        ("She'll say they've gone, couldn't've", "she 'll say they 've gone could n't 've"),
        ("I’m in a “red” T-shirt", "i 'm in a red t-shirt"),
        ("the dogs' toys", "the dogs toys"),
        ("a 'fast' car", "a fast car"),
        ("o'clock rock 'n' roll", "o'clock rock 'n roll"),
        ("black-and-white - and -- grey", "black-and-white and grey"),
        ("at 10:30 a.m. in the U.S.", "at 10:30 a.m. in the u.s."),
        ("Mr. Smith. St. Mary first.", "mr. smith st. mary first"),
        ("1,000 people, 3.5 feet, 1/2", "1,000 people 3.5 feet 1/2"),
        ("100% for $5 & up", "100 % for $ 5 & up"),
        ("Wait... what?! (left)", "wait what -lrb- left -rrb-"),
        ("two dogs.the cat", "two dogs the cat"),
        ("Ein Mädchen läuft; 犬が走る", "ein mädchen läuft 犬が走る"),
        ("  \n ", ""),
        ("", ""),
    ],
)
def test_tokens(text, tokens):
    assert ptb_tokens(text) == tokens


def test_tokens_of_tokens_are_themselves():
    for captions in GOLDEN["cider_d"]["tokenised_references"].values():
        for caption in captions:
            assert ptb_tokens(caption) == caption
            assert ptb_tokens(caption.capitalize() + ".") == caption
