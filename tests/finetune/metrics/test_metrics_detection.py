"""All boxes of a reply against all gold boxes: the matching, what is counted, and by which names."""

import itertools
import random

import pytest

from finetune.metrics.boxes import IOU_THRESHOLD, box_iou
from finetune.metrics.detection import (
    Counts,
    GoldBoxes,
    NamedBox,
    count_by_name,
    largest_matching,
    match_boxes,
    reply_boxes,
)

SIZE = (1000, 1000)
A, B, C = (100, 100, 200, 200), (150, 200, 400, 500), (600, 600, 900, 900)


def gold(*boxes, names_count=False):
    named = [NamedBox(*box) if isinstance(box[0], str) else NamedBox(None, box) for box in boxes]
    return GoldBoxes(tuple(named), names_count)


def markup(*boxes, label=None):
    points = "".join("<box>({},{}),({},{})</box>".format(*box) for box in boxes)
    return points if label is None else f"<ref>{label}</ref>{points}"


def counts(reply, right):
    found = match_boxes(reply_boxes(reply, SIZE), right).counts
    return found.found, found.extra, found.missed


@pytest.mark.parametrize(
    ("reply", "right", "expected"),
    [
        (markup(A, B), gold(A, B), (2, 0, 0)),
        (markup(B, A), gold(A, B), (2, 0, 0)),  # in any order
        (markup(A, A), gold(A, B), (1, 1, 1)),  # a box is found once
        (markup(A, B, C), gold(A), (1, 2, 0)),
        (markup(C), gold(A, B), (0, 1, 2)),
        ("There is none.", gold(), (0, 0, 0)),
        ("", gold(), (0, 0, 0)),
        (markup(A), gold(), (0, 1, 0)),
        ("", gold(A), (0, 0, 1)),
        ("(100,100),(200,200)</box><box>(150,200),(400,500)</box>", gold(A, B), (2, 0, 0)),  # continues an open <box>
        ("(100,100),(200,200)", gold(A), (1, 0, 0)),
        ("<quad>(100,100),(200,100),(200,200),(100,200)</quad>", gold(A), (1, 0, 0)),
        (markup(A, label="dog"), gold(("cat", A)), (1, 0, 0)),  # one thing is asked for
        (markup(A, label="dog"), gold(("cat", A), names_count=True), (0, 1, 1)),
        (markup(A), gold(("cat", A), names_count=True), (0, 1, 1)),
        (markup(A, label=" CAT"), gold(("cat", A), names_count=True), (1, 0, 0)),
        (markup(A, label="cafe\u0301"), gold(("café", A), names_count=True), (1, 0, 0)),
        (markup(A, label="dog") + markup(B, label="cat"), gold(("cat", A), ("dog", B), names_count=True), (0, 2, 2)),
    ],
)
def test_what_is_found_what_is_too_many_and_what_is_missed(reply, right, expected):
    assert counts(reply, right) == expected


def test_precision_recall_and_f1():
    some = Counts(found=4, extra=1, missed=4)
    assert (some.precision, some.recall, some.f1) == (0.8, 0.5, pytest.approx(8 / 13))
    assert (Counts().precision, Counts().recall, Counts().f1) == (None, None, 1.0)
    assert Counts(extra=2).f1 == Counts(missed=1).f1 == 0.0
    assert some + Counts(1, 1, 1) == Counts(5, 2, 5)


def test_a_greedy_choice_would_find_fewer():
    """The first box overlaps both gold boxes, the second one of them: taken in order, one would be left over."""
    wide, left, right = (0, 0, 100, 100), (0, 0, 60, 100), (40, 0, 100, 100)
    assert box_iou(wide, left) > box_iou(wide, right) - 1e-9 >= IOU_THRESHOLD - 1e-9
    found = match_boxes((NamedBox(None, wide), NamedBox(None, left)), gold(left, right))
    assert found.counts == Counts(2, 0, 0)
    assert found.pairs == ((0, 1), (1, 0))


def test_the_matching_is_the_largest():
    """Against trying all, on random graphs."""
    rng = random.Random(1)
    for _ in range(300):
        lefts, rights = rng.randint(0, 5), rng.randint(0, 5)
        candidates = [[right for right in range(rights) if rng.random() < 0.4] for _ in range(lefts)]
        found = largest_matching(candidates)
        assert all(right in candidates[left] for left, right in found)
        assert len({left for left, _ in found}) == len({right for _, right in found}) == len(found)
        tried = max(
            (
                sum(right in candidates[left] for left, right in zip(chosen, order, strict=False))
                for chosen in [range(lefts)]
                for order in itertools.permutations([*range(rights), *range(-lefts, 0)], lefts)
            ),
            default=0,
        )
        assert len(found) == tried


def test_a_reply_that_repeats_itself_a_thousand_times():
    many = 1500
    boxes = tuple(NamedBox(None, A) for _ in range(many))
    assert match_boxes(boxes, gold(*[A] * 3)).counts == Counts(3, many - 3, 0)
    chain = [[number, number + 1] for number in range(many)]
    assert len(largest_matching([*chain[::-1], [0]])) == many + 1


def test_boxes_are_counted_by_name():
    named = gold(("cat", A), ("dog", B), ("Cat", C), names_count=True)
    reply = markup(A, label="cat") + "\n" + markup(A, label="bird") + markup(B)
    matched = match_boxes(reply_boxes(reply, SIZE), named)
    assert count_by_name([(matched, None)]) == {
        "cat": Counts(found=1, missed=1),
        "dog": Counts(missed=1),
        "bird": Counts(extra=2),  # the last box belongs to the phrase before it
    }
    single = match_boxes(reply_boxes(markup(A, C), SIZE), gold(A))
    assert count_by_name([(single, "the red car")]) == {"the red car": Counts(1, 1, 0)}
