"""`data.box_edge`: coordinates of 1000, which stand for the image's far edge, in boxes and quads."""

import pytest

from finetune.data.checks.checking import _check
from finetune.data.checks.rules import Rules
from finetune.data.sample import BadField, Origin, Sample
from qwenvl import ImageAccess

EDGE = "<ref>square</ref><box>(100,100),(400,1000)</box><quad>(0,0),(1000,0),(1000,1000),(0,1000)</quad>"
INSIDE = "<ref>square</ref><box>(100,100),(400,999)</box><quad>(0,0),(999,0),(999,999),(0,999)</quad>"


@pytest.fixture
def check(tiny_processor):
    def run(messages, **settings):
        rules = Rules(tiny_processor.tokenizer, None, **settings)
        fitted, _ = _check(Sample(tuple(messages), Origin("a.json", 1), ImageAccess()), rules)
        return tiny_processor.tokenizer.decode(fitted.rendered.ids)

    return run


def chat(user, assistant, **flag):
    return [{"role": "user", "content": user, **flag}, {"role": "assistant", "content": assistant, **flag}]


def test_with_clamp_1000_is_999(check):
    parts = [{"type": "text", "text": EDGE, "grounding": True}, {"type": "text", "text": "1000"}]
    written = check([*chat(parts, EDGE, grounding=True)], box_edge="clamp")
    assert written.count(INSIDE) == 2 and written.count("1000") == 1
    assert check(chat("Where?", EDGE), grounding=True, box_edge="clamp").count(INSIDE) == 1
    as_text = check(chat("Where?", EDGE), box_edge="clamp", markup_as_text=frozenset({"<ref>", "<box>", "<quad>"}))
    assert as_text.count(EDGE) == 1, "text that is no markup stays as it is"


def test_without_it_the_refusal_names_it(check):
    with pytest.raises(BadField, match=r"coordinate 1000 is outside .*data.box_edge: clamp takes 1000 as 999"):
        check(chat("Where?", EDGE, grounding=True))


@pytest.mark.parametrize("far", ["1001", "4000", "-1"])
def test_coordinates_further_out_are_refused_with_either(check, far):
    for box_edge in ("error", "clamp"):
        with pytest.raises(BadField, match=f"coordinate {far} is outside") as caught:
            check(chat("Where?", EDGE.replace("400", far), grounding=True), box_edge=box_edge)
        assert ("clamp" in caught.value.reason) == (box_edge == "error")


def test_all_that_is_wrong_is_told_at_once(check):
    user = "in <box>((4, 2), (994, 52))</box>"
    with pytest.raises(BadField) as caught:
        check([{"role": "user", "content": text, "grounding": True} for text in (user, "<box>(0.1,0.1),(1,1)</box>")])
    assert caught.value.field == "messages[0]"
    assert "'((4, 2), (994, 52))'" in caught.value.reason
    assert "messages[1]: <box> holds '(0.1,0.1),(1,1)'" in caught.value.reason
    assert "it has no assistant's turn" in caught.value.reason
