"""Text that looks like markup: found, named as the recipe names it, refused or counted."""

import pytest

from finetune.data.checks.markup import (
    check_markup_names,
    find_markup,
    grounding_problems,
    markup_kind,
    talk_about_markup,
    why_refused,
)
from finetune.data.checks.problems import find_problems
from finetune.data.sample import Origin, Sample
from finetune.errors import UserError
from qwenvl.text.vocabulary import CONTROL_TOKENS


def kinds(text, grounding=False):
    return [look.kind for look in find_markup([{"role": "user", "content": text}], grounding)]


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("<image>", ["<image>", "</image>", "<image 1>", "<image_2>", "<IMAGE>", "<ImageHere>", "<image_soft_token>"]),
        ("<img>", ["<IMG>", "</IMG>", "< img>", "</ img>", '<img src="a.png">', "<img/>", "<IMG_CONTEXT>", "<img"]),
        ("<|vision_start|>", ["<|vision_start|>"]),
        ("<bbox>", ["<bbox>", "</BBOX>"]),
        ("<ref-object>", ["<ref-object>"]),
        ("<video>", ["<video>"]),
        ("[IMG]", ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]),
        ("[INST]", ["[INST]", "[/INST]"]),
        ("<box>", ["<box>(1,2),(3,4)</box>", "</box>"]),
        ("<loc>", ["<loc0012>", "<loc_12>"]),
        (
            "Picture 1:",
            ["Picture 2: scans/a.png", "Picture 1:a.JPG", "Picture 1: a.png\u8fd9\u662f", "Picture 1: a.pdf#3"],
        ),
        ("Picture 1:", ["Picture 1: my scan (2).png", "Picture 12: my scan.tif \nWhat?"]),
        ("data:image/", ["data:image/png;base64,AAAA"]),
    ],
)
def test_look_alikes(kind, texts):
    for text in texts:
        assert kinds(f"See {text}") == [kind] == kinds(text), text
    assert markup_kind(kind) == kind


@pytest.mark.parametrize(
    "text",
    [
        "a < image b > c",
        "if x<img and y",
        "<imagery>",
        "Picture 1: ",
        "Picture 1: a png file (see scan.png) of a cat",
        "x[1]",
        "[x]",
        "<b>bold</b>",
        "1 < 2 > 0",
        "<|",
        "|>",
    ],
)
def test_other_text_is_left_alone(text):
    assert kinds(text) == []


def test_every_control_token_is_found():
    for token in CONTROL_TOKENS:
        assert kinds(f"x{token}y"), token


def test_grounding_text_has_its_own_check():
    assert kinds("<ref>a</ref><box>(1,2),(3,4)</box><image>", grounding=True) == ["<image>"]
    parts = [{"type": "text", "text": "<box>", "grounding": True}, {"type": "text", "text": "<box>"}]
    assert len(find_markup([{"role": "user", "content": parts}], False)) == 1


def test_the_reason_names_all_kinds_and_the_way_out():
    reason = why_refused(find_markup([{"role": "user", "content": "x <image> [IMG]"}], False))
    assert reason.startswith("<image>, [IMG] look like markup") and "'x <image> [IMG]'" in reason
    assert reason.endswith('data.markup_as_text: [<image>, "[IMG]"]')


@pytest.mark.parametrize("name", ["<image>", "<IMG>", "<img src", "<box", "[/INST]", "Picture 1:", "<|im_end|>"])
def test_names_of_a_recipe(name):
    assert len(check_markup_names([name])) == 1


@pytest.mark.parametrize("name", ["image", "<b>", "", "x"])
def test_names_of_nothing_are_refused(name):
    with pytest.raises(UserError, match=r"data.markup_as_text: .* is not looked for"):
        check_markup_names([name])


def test_tags_that_are_no_tokens_are_counted_where_they_may_be_text():
    assert talk_about_markup("<ref>a</ref><box>(1,2),(3,4)</box>, <image>") == []
    assert talk_about_markup("<ref>a</ref><box>(x1,y1)</box>, </quad> and <box>") == ["<box>", "<quad>"]
    text = "Where? As <ref>it</ref><box>(x1,y1),(x2,y2)</box>."
    messages = ({"role": "user", "content": text, "grounding": True}, {"role": "assistant", "content": "x"})
    sample = Sample(messages, Origin("rows.jsonl", 1))
    assert find_problems(sample, grounding=False, markup_as_text=ALLOWED) == ([], ["<box>"])


ALLOWED = frozenset({"<ref>", "<box>"})


@pytest.mark.parametrize(
    "text", ["Use <box></box>.", "as <ref>object</ref><box>(x1,y1),(x2,y2)</box>", "<ref> and <box>"]
)
def test_talk_about_the_markup(text):
    assert grounding_problems(text, ALLOWED) == []
    assert all("data.markup_as_text: [<" in reason for reason in grounding_problems(text, ()))
    assert grounding_problems(text, ())


@pytest.mark.parametrize(
    "text",
    [
        "<box>((4, 2), (994, 52))</box>",
        "<box>[100,100,400,400]</box>",
        "<box>(0.1,0.1),(0.4,0.4)</box>",
        "<box>(100,100),(400,1000)</box>",
        "<box>(1,2),(3,4)",
    ],
)
def test_wrong_coordinates_are_no_talk(text):
    assert grounding_problems(text, ALLOWED) == grounding_problems(text, ()) != []
