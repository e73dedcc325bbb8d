"""Boxes of replies against gold boxes: overlap, what counts as a box, clicks."""

import random

import pytest

from finetune.metrics import box_iou, click_accuracy, first_box, grounding_accuracy


def test_iou_of_known_boxes():
    assert box_iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0  # an edge in common
    assert box_iou((0, 0, 4, 4), (1, 1, 2, 2)) == pytest.approx(1 / 16)
    assert box_iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0  # both empty


def test_iou_is_symmetric_within_0_and_1_and_unmoved_by_scale():
    rng = random.Random(3)

    def box():
        x1, x2 = sorted(rng.uniform(0, 9) for _ in range(2))
        y1, y2 = sorted(rng.uniform(0, 9) for _ in range(2))
        return x1, y1, x2, y2

    for _ in range(300):
        a, b = box(), box()
        iou = box_iou(a, b)
        assert 0 <= iou <= 1
        assert iou == box_iou(b, a)
        assert box_iou([3 * x + 1 for x in a], [3 * x + 1 for x in b]) == pytest.approx(iou, abs=1e-9)
        assert box_iou(a, a) == pytest.approx(1)


@pytest.mark.parametrize(
    ("reply", "box"),
    [
        ("<box>(100,200),(500,400)</box>", (20, 20, 100, 40)),
        ("<ref>the dog</ref><box>(100,200),(500,400)</box>.", (20, 20, 100, 40)),
        ("(100,200),(500,400)</box>", (20, 20, 100, 40)),  # goes on after an open <box>
        (" (100,200),(500,400)", (20, 20, 100, 40)),  # control tokens skipped
        ("(100,200),(500,400) is the dog", (20, 20, 100, 40)),
        ("(100,200),(500,400)</box><ref>cat</ref><box>(0,0),(9,9)</box>", (20, 20, 100, 40)),
        ("<box>(100,200),(500,400)</box><box>(0,0),(9,9)</box>", (20, 20, 100, 40)),
        ("<box>(500,400),(100,200)</box>", (20, 20, 100, 40)),  # corners put in order
        ("<quad>(0,0),(1,0),(1,1),(0,1)</quad><box>(100,200),(500,400)</box>", (20, 20, 100, 40)),
        ("(100,200),(500,", None),
        ("(100,200)", None),
        ("<box>(100,200)</box>", None),
        ("(a,b),(c,d)</box>", None),
        ("the dog is at 100, 200", None),
        ("", None),
    ],
)
def test_the_first_box_of_a_reply(reply, box):
    found = first_box(reply, (200, 100))
    assert found == (None if box is None else pytest.approx(box))


def test_half_an_overlap_is_enough():
    gold = (0, 0, 100, 100)
    assert grounding_accuracy("(0,0),(100,50)</box>", gold, (1000, 1000)) == 1.0
    assert grounding_accuracy("(0,0),(100,49)</box>", gold, (1000, 1000)) == 0.0
    assert grounding_accuracy("no box", gold, (1000, 1000)) == 0.0
    # Of the image's own width and height: thousandths are no pixels.
    assert grounding_accuracy("<box>(0,0),(500,250)</box>", gold, (200, 400)) == 1.0


def test_a_click_is_the_middle_of_the_box():
    gold = (40, 40, 60, 60)
    assert click_accuracy("<box>(0,0),(999,999)</box>", gold, (100, 100)) == 1.0
    assert click_accuracy("(400,400),(400,400)</box>", gold, (100, 100)) == 1.0  # on its corner
    assert click_accuracy("(390,400),(400,400)</box>", gold, (100, 100)) == 0.0
    assert click_accuracy("<box>(600,0),(610,100)</box>", gold, (100, 100)) == 0.0
    assert click_accuracy("here", gold, (100, 100)) == 0.0
