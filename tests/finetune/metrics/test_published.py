"""What the published scripts do otherwise; expected values follow from their text, not from running them."""

import numpy as np
import pytest

from finetune.metrics import grounding_accuracy, relaxed_accuracy
from finetune.metrics.published import published_box, published_gqa_answer, published_grounding_accuracy


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Yes, it is a red car.", "yes"),
        ("banana tree", "tree"),  # the letters "a " stand in it
        ("It is a man", "man"),
        ("this is the island", ""),  # between the first and the second place of "is "
        ("a cup of tea", "cup"),
        ("the top of the car of it", "top"),
        ("Dog", "dog"),
        ("", ""),
    ],
)
def test_gqas_answers_are_found_by_letters(reply, answer):
    assert published_gqa_answer(reply) == answer


@pytest.mark.parametrize(
    ("reply", "box"),
    [
        ("(999,0),(0,999)", (200, 0, 0, 100)),  # corners as written
        ("(1998,0),(999,999)", (400, 0, 200, 100)),  # beyond 999
        ("<box>( 499.5 ,0),(999,999)</box>", (100, 0, 200, 100)),
        ("dog(999,999),(0,0)(1,2),(3,4)", (200, 100, 0, 0)),
        ("(1,2), (3,4)", None),
        ("(1,2,3),(4)", None),
        ("(1),(2,3,4)", None),
        ("a (b) (1,2),(3,4)", None),  # from the first bracket on
        ("(a,b),(c,d)", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_first_box_of_a_reply(reply, box):
    assert published_box(reply, (200, 100)) == (None if box is None else pytest.approx(box))


def test_boxes_are_compared_as_the_published_script_does():
    size, gold = (1000, 1000), (0, 0, 1000, 1000)
    assert published_grounding_accuracy("(0,0),(999,999)", gold, size) == 1.0
    # 500 / 999 is more than half, 500 / 1000 as large as half: an edge moves by a thousandth.
    assert published_grounding_accuracy("(0,0),(999,500)", (0, 0, 1000, 1001), size) == 1.0
    assert grounding_accuracy("(0,0),(999,500)", (0, 0, 1000, 1001), size) == 0.0
    # Corners the wrong way round have nothing in common with any box; the metric itself puts them in order.
    assert published_grounding_accuracy("(999,999),(0,0)", gold, size) == 0.0
    assert published_grounding_accuracy("(999,0),(0,999)", gold, size) == 0.0
    assert grounding_accuracy("(999,999),(0,0)", gold, size) == 1.0
    with np.errstate(all="raise"):
        for reply in ("(1e400,0),(1,1)", "(nan,0),(1,1)", "(0,0),(0,0)"):
            assert published_grounding_accuracy(reply, (0, 0, 0, 0), size) == 0.0


def test_white_space_around_the_gold_text_counts_in_the_published_order():
    assert relaxed_accuracy("yes", "yes ") == 1.0
    assert relaxed_accuracy("yes", "yes ", published_order=True) == 0.0
    assert relaxed_accuracy("4 ", " 4 ", published_order=True) == 1.0  # a number is read with it
