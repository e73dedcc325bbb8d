"""Format grounding with several boxes, several phrases and nothing to find; and boxes beyond the image."""

import pytest
from formats_for_tests import asked, conversations, one

from finetune.data.formats.row_format import RowFormat
from finetune.data.sample import BadField
from qwenvl.text.grounding import parse_grounding

A, B = [64, 48, 320, 240], [0, 0, 640, 480]
BOX_A, BOX_B = "<box>(100,100),(500,500)</box>", "<box>(0,0),(999,999)</box>"


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"phrase": "cats", "boxes": [A, B]}, "<ref>cats</ref>", BOX_A + BOX_B),
        ({"phrase": "cats", "box": [A, B]}, "<ref>cats</ref>", BOX_A + BOX_B),
        ({"phrase": "cats", "boxes": A}, "<ref>cats</ref>", BOX_A),
        ({"phrase": ["cats"], "boxes": [A, B]}, "<ref>cats</ref>", BOX_A + BOX_B),
        ({"phrase": "pigs", "boxes": []}, "<ref>pigs</ref>", "[]"),
        ({"phrase": "pigs", "box": []}, "<ref>pigs</ref>", "[]"),
        ({"phrase": "pigs", "box": None, "boxes": []}, "<ref>pigs</ref>", "[]"),
        (
            {"phrase": ["cat", "dog"], "boxes": [[A, B], [B]]},
            "<ref>cat</ref>, <ref>dog</ref>",
            f"<ref>cat</ref>{BOX_A}{BOX_B}\n<ref>dog</ref>{BOX_B}",
        ),
        ({"phrase": ["cat", "dog"], "boxes": [[], [B]]}, "<ref>cat</ref>, <ref>dog</ref>", f"<ref>dog</ref>{BOX_B}"),
        ({"phrase": ["cat", "dog"], "boxes": [[], []]}, "<ref>cat</ref>, <ref>dog</ref>", "[]"),
        (
            {"phrase": "animals", "boxes": [A, B, A], "labels": ["cat", "dog", "cat"]},
            "<ref>animals</ref>",
            f"<ref>cat</ref>{BOX_A}{BOX_A}\n<ref>dog</ref>{BOX_B}",
        ),
        ({"phrase": "animal", "box": A, "labels": "cat"}, "<ref>animal</ref>", f"<ref>cat</ref>{BOX_A}"),
    ],
)
def test_rows_with_several_boxes_and_with_none(row, question, answer):
    assert one("grounding", {"image": "a", **row}) == asked("a", question, answer, grounding=True)
    assert RowFormat("grounding").count(row) == 1
    assert not parse_grounding(answer).problems


def test_a_prompt_without_a_phrase_asks_for_all_objects():
    row = {"image": "a", "things": [A, B], "class": ["cat", "dog"]}
    columns = {"boxes": "things", "labels": "class"}
    answer = f"<ref>cat</ref>{BOX_A}\n<ref>dog</ref>{BOX_B}"
    assert one("grounding", row, columns=columns, prompt="框出所有物体") == asked(
        "a", "框出所有物体", answer, grounding=True
    )


def test_several_phrases_fill_a_prompt_and_the_reply_for_nothing_is_configured():
    row = {"image": "a", "phrase": ["cat", "dog"], "boxes": []}
    settings = {"prompt": "Find {phrase}.", "no_object": "没有。"}
    assert one("grounding", row, **settings) == asked("a", "Find cat, dog.", "没有。", grounding=True)


def test_each_of_several_phrases_for_one_box_stays_a_sample():
    row = {"image": "a", "phrase": ["car", "red car"], "box": A}
    assert [answer["content"] for _, answer in conversations("grounding", row)] == [BOX_A] * 2
    assert RowFormat("grounding").count(row) == 2


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        (
            {"phrase": ["cat", "dog"], "boxes": [A, B]},
            "boxes",
            "2 boxes for 2 phrases: give a list of boxes",
        ),
        ({"phrase": ["cat", "dog"], "boxes": [[A]]}, "boxes", "for each of 1 phrases, and the row has 2 phrase(s)"),
        ({"phrase": "cat", "boxes": [[A]], "labels": ["cat"]}, "boxes", "and the row has labels too"),
        ({"phrase": "cat", "boxes": [A], "box": B}, "boxes", "the row has box too"),
        ({"phrase": "cat", "boxes": [A, [1, 2, 3]]}, "boxes[1]", "a list of 4 numbers, not 3 values"),
        ({"phrase": "cat", "boxes": [A, "b"]}, "boxes[1]", "not str"),
        ({"phrase": "cat", "boxes": {"x": 1}}, "boxes", "a box or a list of boxes, not dict"),
        ({"phrase": "cat", "boxes": [A], "labels": ["cat", "dog"]}, "labels", "a list of 1, one for each box, not 2"),
        ({"phrase": "cat", "boxes": [A], "labels": [3]}, "labels[0]", "must be text, not int"),
        ({"phrase": "cat", "boxes": [A], "labels": ["</ref>"]}, "labels[0]", "control token"),
        ({"boxes": [A], "labels": ["cat"]}, "phrase", "write a prompt without {phrase}"),
        ({"phrase": ["cat", "dog"], "boxes": [[A], [[1, 2, 3, "4"]]]}, "boxes[1][0][3]", "must be a number"),
        ({"phrase": "cat", "boxes": [A, [500, 400, 900, 470]]}, "boxes[1]", "reaches 260 pixels beyond the image"),
        ({"phrase": "cat", "box": [500, -3, 600, 470]}, "box", "reaches 3 pixels beyond the image of 640 x 480"),
        ({"phrase": "cat", "boxes": [A, [700, 1, 710, 2]]}, "boxes[1]", "wholly outside"),
        # Labels of some boxes only.
        ({"phrase": "cat", "boxes": [A, B], "labels": ["cat", None]}, "labels[1]", "must be text, not NoneType"),
        ({"phrase": "cat", "boxes": [A, B], "labels": ["cat", " "]}, "labels[1]", "blank"),
        ({"phrase": "cat", "boxes": [A, B], "labels": ["cat"]}, "labels", "a list of 2, one for each box, not 1"),
        # Other shapes, and numbers that are no pixels.
        ({"phrase": "cat", "box": [1, 2, 30, 2, 30, 40, 1, 40]}, "box", "has four points"),
        ({"phrase": "cat", "box": [[1, 2], [30, 2], [30, 40], [1, 40]]}, "box", "has four points"),
        ({"phrase": "cat", "boxes": [A, [1, 2, 30, 2, 30, 40, 1, 40]]}, "boxes[1]", "give the box around them"),
        ({"phrase": "cat", "boxes": [[[1, 2], [30, 2], [30, 40], [1, 40]]]}, "boxes[0]", "four points"),
        ({"phrase": "cat", "box": [0.1, 0.2, 0.5, 0.75]}, "box", "lies within the first pixel of the image"),
        ({"phrase": "cat", "box": [0, 0, 1, 1]}, "box", "multiply fractions by its width and height"),
        ({"phrase": "cat", "boxes": [A, [0, 0, 0, 0]]}, "boxes[1]", "take the row out if it has no box"),
    ],
)
def test_what_does_not_go_together_is_refused(row, field, reason):
    with pytest.raises(BadField) as caught:
        one("grounding", {"image": "a", **row})
    assert caught.value.field == field
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"phrase": "cat", "box": A}, "phrase", "the prompt has no {phrase} to put it in: 'All?'"),
        ({"boxes": [A]}, "labels", "a prompt without {phrase} asks for all objects, with labels"),
    ],
)
def test_a_prompt_without_a_phrase_refuses_other_rows(row, field, reason):
    with pytest.raises(BadField) as caught:
        one("grounding", {"image": "a", **row}, prompt="All?")
    assert caught.value.field == field
    assert reason in caught.value.reason


def test_a_box_may_end_at_the_edge_of_the_image():
    for box in ([0, 0, 640, 480], [-1, -0.5, 641, 480.5]):
        assert one("grounding", {"image": "a", "phrase": "x", "box": box})[1]["content"] == BOX_B


def test_pixels_may_have_fractions():
    """They are rounded down to thousandths of the image, as decimals and not as floating point has them."""
    row = {"image": "a", "phrase": "x", "box": [0.64, 0.4, 64.1, 479.52]}
    assert one("grounding", row)[1]["content"] == "<box>(1,0),(100,999)</box>"
    assert one("grounding", row, box_form="xywh")[1]["content"] == "<box>(1,0),(101,999)</box>"
