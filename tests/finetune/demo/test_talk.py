"""A visitor's conversation: what the models are asked, and what becomes of their replies."""

import io
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from asked_models_for_tests import ScriptedModel
from files_of_pages import BLUE, GREEN, RED, pdf
from PIL import Image

from finetune.demo import talk as talks
from finetune.demo.run_examples import Example
from finetune.demo.talk import Settings, Talk
from finetune.errors import UserError
from finetune.serve.asked import EngineClosed, QueueFull, Refused
from qwenvl.views import Views

PLAIN = Settings(("",))


def png(colour=GREEN, size=(100, 50)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def a_talk(folder: Path, *models: ScriptedModel) -> Talk:
    return Talk(models, folder)


def ask(talk: Talk, text: str, settings: Settings | None = None):
    """The turn, once it has ended."""
    *_, turn = talk.ask(text, settings or Settings(("",) * len(talk.models)))
    return turn


def texts(messages) -> list[str]:
    return [
        message["content"] if isinstance(message["content"], str) else message["content"][-1]["text"]
        for message in messages
    ]


def images(message) -> list[bytes]:
    parts = [] if isinstance(message["content"], str) else message["content"]
    return [part["image"]["bytes"] for part in parts if part["type"] == "image"]


def test_each_turn_goes_on_from_those_before_it(tmp_path):
    model = ScriptedModel(["The first reply.", "The second."])
    talk = a_talk(tmp_path, model)
    talk.upload("a.png", png())
    first = ask(talk, " What is it? ")
    second = ask(talk, "And then?", Settings(("",), max_new_tokens=7, temperature=0.5))
    assert (first.replies[0].text, first.replies[0].state) == ("The first reply.", "ended")
    assert second.replies[0].text == "The second."
    (messages, most, temperature) = model.asked[1]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert texts(messages) == ["What is it?", "The first reply.", "And then?"]
    assert images(messages[0]) == [png()] and not images(messages[2])
    assert (most, temperature) == (7, 0.5)


def test_each_message_is_put_into_the_prompt_of_each_model(tmp_path):
    tuned, base = ScriptedModel(["a", "b"]), ScriptedModel(["c", "d"])
    talk = a_talk(tmp_path, tuned, base)
    settings = Settings(("{question} Answer:", " "))
    ask(talk, "Who?", settings)
    ask(talk, "When?", settings)
    assert texts(tuned.asked[1][0]) == ["Who? Answer:", "a", "When? Answer:"]
    assert texts(base.asked[1][0]) == ["Who?", "c", "When?"]


def test_a_prompt_without_a_place_for_the_message_is_refused(tmp_path):
    model = ScriptedModel(["a"])
    talk = a_talk(tmp_path, model)
    with pytest.raises(UserError, match=r"no \{question\}"):
        ask(talk, "Who?", Settings(("Answer in one word.",)))
    assert not talk.turns and not model.asked


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_message_is_not_asked(text, tmp_path):
    talk = a_talk(tmp_path, ScriptedModel(["a"]))
    with pytest.raises(UserError, match="Write a message first"):
        ask(talk, text)
    assert not talk.turns


def test_the_images_of_a_message_without_a_reply_stay_for_the_next(tmp_path):
    model = ScriptedModel(["", "Now."])
    talk = a_talk(tmp_path, model)
    talk.upload("a.png", png())
    ask(talk, "First?")
    ask(talk, "Second?")
    (message,) = model.asked[1][0]
    assert texts([message]) == ["Second?"] and images(message) == [png()]


def test_a_base_model_has_no_turns_and_its_pictures_stay_chosen(tmp_path):
    model = ScriptedModel(["a", "b"], style="base")
    talk = a_talk(tmp_path, model)
    talk.upload("a.png", png())
    ask(talk, "First?")
    ask(talk, "Second?")
    (message,) = model.asked[1][0]
    assert texts([message]) == ["Second?"] and images(message) == [png()]


def test_markup_in_messages_is_as_it_was_trained(tmp_path):
    for is_text, flag in ((False, True), (True, None)):
        model = ScriptedModel(["a"], markup_is_text=is_text)
        ask(a_talk(tmp_path, model), "Where is <ref>the dog</ref>?")
        assert model.asked[0][0][0].get("grounding") is flag


def test_pages_of_a_file_are_chosen_in_the_order_of_choice(tmp_path):
    model = ScriptedModel(["a"])
    talk = a_talk(tmp_path, model)
    talk.upload("scan.pdf", pdf([RED, GREEN, BLUE]))
    assert talk.chosen == []
    for number in (2, 0, 1, 1):
        talk.toggle(number)
    turn = ask(talk, "What?")
    assert [picture.name for picture in turn.pictures] == ["scan.pdf, page 3", "scan.pdf, page 1"]
    assert [part["image"]["page"] for part in model.asked[0][0][0]["content"][:2]] == [3, 1]
    assert talk.chosen == [], "a message has its pictures once"


def test_further_pages_come_after_those_of_the_file_and_choices_stay(tmp_path):
    talk = a_talk(tmp_path, ScriptedModel(["a"]))
    talk.upload("scan.pdf", pdf([RED] * 14, size=(20, 20)))
    talk.upload("a.png", png())
    assert (talk.pages_left, talk.chosen) == (2, [12])
    talk.more_pages()
    assert [one.name for one in talk.offered[11:]] == [f"scan.pdf, page {n}" for n in (12, 13, 14)] + ["a.png"]
    assert (talk.pages_left, talk.chosen) == (0, [14])


def test_what_a_visitor_gives_is_bounded(tmp_path, monkeypatch):
    talk = a_talk(tmp_path, ScriptedModel(["a"]))
    talk.upload("a.png", png())
    with pytest.raises(UserError, match=r"b.png: it is here already"):
        talk.upload("b.png", png())
    monkeypatch.setattr(talks, "MOST_HELD", len(png()) + 10)
    with pytest.raises(UserError, match="too many files"):
        talk.upload("c.png", png(RED))
    monkeypatch.undo()
    monkeypatch.setattr(talks, "MOST_OFFERED", 3)
    with pytest.raises(UserError, match="There are 1 pictures already"):
        talk.upload("scan.pdf", pdf([RED, GREEN, BLUE]))
    monkeypatch.undo()
    monkeypatch.setattr(talks, "MOST_IN_MESSAGE", 1)
    talk.upload("scan.pdf", pdf([RED, GREEN]))
    with pytest.raises(UserError, match="takes 1 pictures at most"):
        talk.toggle(1)
    assert talk.chosen == [0]


def test_a_stopped_reply_stays_and_the_conversation_goes_on(tmp_path):
    model = ScriptedModel(["one two three four five six", "Next."], pause=0.02)
    talk = a_talk(tmp_path, model)
    for turn in talk.ask("First?", PLAIN):
        if turn.replies[0].text:
            threading.Thread(target=talk.stop).start()
    assert turn.replies[0].state == "stopped" and turn.replies[0].text.startswith("one")
    assert model.tickets[0].cancelled.is_set() and not talk.is_running
    ask(talk, "Second?")
    assert texts(model.asked[1][0])[1] == turn.replies[0].text


def test_a_reply_that_nobody_reads_any_more_is_ended(tmp_path):
    model = ScriptedModel(["one two three four five six"], pause=0.02)
    talk = a_talk(tmp_path, model)
    replies = talk.ask("First?", PLAIN)
    next(replies)
    replies.close()
    assert model.tickets[0].cancelled.is_set() and not talk.is_running


def test_one_message_is_asked_at_a_time(tmp_path):
    talk = a_talk(tmp_path, ScriptedModel(["one two three"], pause=0.02))
    replies = talk.ask("First?", PLAIN)
    next(replies)
    with pytest.raises(UserError, match="A reply is being written"):
        next(talk.ask("Second?", PLAIN))
    talk.stop()
    with suppress(StopIteration):
        while True:
            next(replies)


def test_a_reply_at_the_most_new_tokens_is_said_to_be_cut(tmp_path):
    talk = a_talk(tmp_path, ScriptedModel(["one two three four"]))
    reply = ask(talk, "First?", Settings(("",), max_new_tokens=2)).replies[0]
    assert (reply.text, reply.state) == ("one two ", "cut")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (QueueFull(), "The model is busy: try again in a moment."),
        (EngineClosed(), "The model is being closed."),
        (UserError("The conversation is too long"), "The conversation is too long."),
        (Refused("memory", "it does not fit"), "it does not fit."),
    ],
)
def test_a_fault_of_one_model_leaves_the_other_ones_reply(fault, said, tmp_path):
    talk = a_talk(tmp_path, ScriptedModel([fault]), ScriptedModel(["A reply."]))
    broken, whole = ask(talk, "First?").replies
    assert (broken.state, broken.problem) == ("failed", said)
    assert (whole.state, whole.text) == ("ended", "A reply.")


def test_a_new_conversation_keeps_nothing(tmp_path):
    model = ScriptedModel(["a", "b"])
    talk = a_talk(tmp_path, model)
    talk.upload("a.png", png())
    ask(talk, "First?")
    talk.forget()
    assert not list(tmp_path.iterdir())
    ask(talk, "Second?")
    assert texts(model.asked[1][0]) == ["Second?"] and not images(model.asked[1][0][0])


# ---- boxes


BOXES = "<ref>the dog</ref><box>(100,200),(500,800)</box>"


def test_boxes_are_drawn_on_the_last_picture_and_told_in_its_pixels(tmp_path):
    model = ScriptedModel(["A picture.", BOXES])
    talk = a_talk(tmp_path, model)
    talk.upload("a.png", png(RED))
    ask(talk, "What?")
    talk.upload("b.png", png(BLUE, (200, 100)))
    ask(talk, "And?")
    reply = ask(talk, "Where?").replies[0]
    reply = talk.turns[1].replies[0]
    assert reply.boxes == ("the dog: (20, 20) (100, 80)",) and reply.drawn is not None
    with Image.open(reply.drawn) as drawn:
        assert drawn.size == (200, 100)
        red, _, blue = drawn.getpixel((60, 50))
        assert blue > 200 and red < 60
        assert drawn.getpixel((60, 20)) != drawn.getpixel((60, 50))


def test_boxes_of_a_prompt_that_opens_one_are_read(tmp_path):
    talk = a_talk(tmp_path, ScriptedModel(["(100,200),(500,800)</box>"], style="base"))
    talk.upload("a.png", png())
    reply = ask(talk, "the dog", Settings(("<ref>{phrase}</ref><box>",))).replies[0]
    assert reply.boxes == ("box: (10, 10) (50, 40)",) and reply.drawn is not None


def test_boxes_without_a_picture_to_draw_on_are_said_to_be(tmp_path):
    alone = ask(a_talk(tmp_path, ScriptedModel([BOXES])), "Where?").replies[0]
    assert "no picture" in alone.note and alone.drawn is None and not alone.boxes
    talk = a_talk(tmp_path, ScriptedModel([BOXES], views=Views(page=False)))
    talk.upload("a.png", png())
    parts = ask(talk, "Where?").replies[0]
    assert "not shown the whole picture" in parts.note and parts.drawn is None


# ---- examples


def an_example(folder: Path) -> Example:
    file = folder / "row.jpg"
    Image.new("RGB", (40, 40), RED).save(file)
    return Example("rows.jsonl, row 3", "Who?", None, (file,), file, ("Ann",), (("after training", "Bob"),))


def test_an_example_brings_its_picture_and_its_answer(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "page").mkdir()
    example = an_example(tmp_path / "run")
    model = ScriptedModel(["Ann"])
    talk = a_talk(tmp_path / "page", model)
    talk.upload("other.png", png())
    talk.fill_in(example)
    assert talk.chosen == [1]
    turn = ask(talk, "Who?")
    assert turn.example == example and images(model.asked[0][0][0]) == [example.images[0].read_bytes()]
    talk.fill_in(example)
    assert talk.chosen == [1], "its picture is there already"
    assert ask(talk, "Who else?").example is None, "the question is another one"
    talk.fill_in(example)
    talk.toggle(0)
    assert ask(talk, "Who?").example is None, "there is another picture"
    assert (tmp_path / "run" / "row.jpg").exists()
