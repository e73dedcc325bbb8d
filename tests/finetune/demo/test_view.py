"""The conversation as HTML: text is text."""

from html.parser import HTMLParser
from pathlib import Path

from asked_models_for_tests import ScriptedModel

from finetune.demo import view
from finetune.demo.pictures import Picture
from finetune.demo.run_examples import Example
from finetune.demo.talk import Reply, Turn

EVIL = (
    "<ref>x</ref> <img src=http://evil.example/a.png onerror=alert(1)> </p><script>alert(1)</script> "
    "\" ' & \u202e {{7*7}}"
)


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def a_turn(said: str) -> Turn:
    picture = Picture(f"{said}.png", {}, (1, 1), Path("/page/one.jpg"))
    example = Example("row 1", said, None, (), Path("/page/two.jpg"), (said, said), ((f"after {said}", said),))
    reply = Reply(f"{said} Answer:", said, "ended", said, (said,), Path("/page/drawn.jpg"), said)
    return Turn(said, (picture,), (reply,), example)


def test_whatever_is_said_is_shown_as_text():
    model = ScriptedModel([EVIL], title=EVIL, about=(EVIL,))
    turns = [a_turn(EVIL), a_turn("plain")]
    html = [
        view.past(turns, 0, EVIL),
        view.last_reply(turns[:1], 0, EVIL),
        view.heading(EVIL, [model, model]),
        view.notice([EVIL]),
        view.for_screen_readers(EVIL),
        view.choices(EVIL, [view.Choice(Path("/page/one.jpg"), EVIL, True)]),
    ]
    for one in html:
        read = Tags(one)
        assert not [tag for tag, _ in read.tags if tag in ("script", "ref")]
        assert {attributes["src"] for tag, attributes in read.tags if tag == "img"} <= {
            "gradio_api/file=/page/one.jpg",
            "gradio_api/file=/page/drawn.jpg",
        }
        assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
        assert "<img src=http://evil.example/a.png onerror=alert(1)>" in read.text
        assert "\u202e" not in one and "{{7*7}}" in read.text


def test_the_last_reply_is_apart_from_what_is_before_it():
    turns = [a_turn("one"), a_turn("two")]
    before, last = Tags(view.past(turns, 0, "m")).text, Tags(view.last_reply(turns, 0, "m")).text
    assert "one Answer:" in before and "two Answer:" in before
    assert "after one" in before and "after two" not in before and "after two" in last


def test_every_state_of_a_reply_says_what_it_is():
    said = {
        "waiting": "Waiting for the model",
        "stopped": "Stopped.",
        "cut": "Cut at the most new tokens",
        "ended": "No reply: the message is forgotten.",
    }
    for state, words in said.items():
        turn = Turn("Who?", (), (Reply("Who?", state=state),))
        assert words in view.last_reply([turn], 0, "m")
    assert view.last_reply([], 0, "m") == "" and "Nothing was asked yet" in view.past([], 0, "m")


def test_an_answer_is_shown_once_the_reply_is_there():
    turn = a_turn("one")
    assert "Right answer" in view.last_reply([turn], 0, "m")
    turn.replies[0].state = "writing"
    assert "Right answer" not in view.last_reply([turn], 0, "m")


def test_a_screen_reader_is_told_the_replies_without_markup():
    turn = Turn(
        "Where?", (), (Reply("", "<ref>The dog</ref><box>(1,2),(3,4)</box> sleeps."), Reply("", problem="Busy."))
    )
    assert view.spoken(turn, ["a", "b"]) == "a: The dog sleeps. b: Busy."


def test_choices_are_buttons_with_names():
    html = view.choices("Pictures", [view.Choice(Path("/p/1.jpg"), "a.png", True), view.Choice(Path("/p/2.jpg"), "b")])
    buttons = [attributes for tag, attributes in Tags(html).tags if tag == "button"]
    assert [one["data-number"] for one in buttons] == ["0", "1"]
    assert buttons[0]["aria-pressed"] == "true" and "aria-pressed" not in buttons[1]
    assert view.choices("Pictures", []) == ""
