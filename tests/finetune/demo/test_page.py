"""The page in a browser: what a visitor does, with models that say what the test tells them to."""

import io
from mimetypes import guess_type

import pytest
from asked_models_for_tests import ScriptedModel
from demo_page_for_tests import ask, browser, opened, page_files, served  # noqa: F401 (fixtures)
from files_of_pages import BLUE, GREEN, RED, pdf
from PIL import Image

from finetune.demo.run_examples import Example

MARKUP = (
    "<ref>the dog</ref><box>(100,200),(500,800)</box> <b>bold</b> **bold** $x$ ${1+1} {{value}} "
    "<img src=http://evil.example/a.png> ![a](http://evil.example/b.png)\n  two  spaces"
)


def png(colour=GREEN, size=(300, 200)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def upload(page, *files: tuple[str, bytes]) -> None:
    given = [{"name": name, "mimeType": str(guess_type(name)[0]), "buffer": data} for name, data in files]
    page.locator("input[type=file]").first.set_input_files(given)


def test_a_picture_is_asked_about_and_the_boxes_of_the_reply_are_drawn(browser, page_files):  # noqa: F811
    model = ScriptedModel([MARKUP], template="{question} Answer:")
    with served([model], page_files) as address, opened(browser, address) as page:
        upload(page, ("a.png", png()), ("bad.png", b"no picture at all"))
        page.get_by_role("alert").get_by_text("bad.png: its content is not an image").wait_for()
        page.get_by_role("button", name="a.png", pressed=True).wait_for()
        ask(page, "Where is <i>the dog</i>?")
        page.get_by_alt_text("The picture with the boxes of the reply").wait_for()
        assert page.locator(".by-model .reply").inner_text() == MARKUP
        assert page.locator(".by-visitor .text").first.inner_text() == "Where is <i>the dog</i>?"
        drawn = page.get_by_alt_text("The picture with the boxes of the reply")
        assert drawn.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [300, 200]
        assert not page.get_by_role("button", name="a.png", pressed=True).count(), "it is in the conversation now"
        (message,) = model.asked[0][0]
        assert message["content"][1]["text"] == "Where is <i>the dog</i>? Answer:"
        assert message["content"][0]["image"]["bytes"] == png()
    assert not list(page_files.rglob("a.png")), "an upload stays in memory alone"


@pytest.mark.slow
def test_pages_of_a_pdf_are_chosen_from(browser, page_files):  # noqa: F811
    model = ScriptedModel(["A reply."])
    with served([model], page_files) as address, opened(browser, address) as page:
        upload(page, ("scan.pdf", pdf([RED, GREEN, BLUE] * 5, size=(50, 50))))
        page.get_by_role("button", name="Show more pages (3 left)").click()
        third = page.get_by_role("button", name="scan.pdf, page 15")
        third.click()
        page.get_by_role("button", name="scan.pdf, page 15", pressed=True).wait_for()
        assert third.evaluate("button => button === document.activeElement"), "the keyboard goes on from there"
        page.get_by_role("button", name="scan.pdf, page 2", exact=True).click()
        page.get_by_text("Pictures, 2 in the message").wait_for()
        page.get_by_role("button", name="scan.pdf, page 15").click()
        page.get_by_text("Pictures, 1 in the message").wait_for()
        ask(page, "What is it?")
        page.get_by_text("A reply.", exact=True).first.wait_for()
    assert [part["image"]["page"] for part in model.asked[0][0][0]["content"][:-1]] == [2]


@pytest.mark.slow
def test_two_models_answer_side_by_side_and_each_goes_on_from_its_own_reply(browser, page_files):  # noqa: F811
    tuned, base = ScriptedModel(["mine", "more"], title="tuned"), ScriptedModel(["theirs"], title="base")
    with served([tuned, base], page_files) as address, opened(browser, address) as page:
        for text in ("First?", "Second?"):
            ask(page, text)
            page.get_by_role("button", name="Send", disabled=False).wait_for()
            page.get_by_text(text).nth(1).wait_for()
            page.locator(".talk").nth(1).get_by_text("theirs").nth(0 if text == "First?" else 1).wait_for()
        left, right = (page.get_by_role("region", name=f"Conversation with {name}") for name in ("tuned", "base"))
        assert left.locator(".reply").all_inner_texts() == ["mine", "more"]
        assert right.locator(".reply").all_inner_texts() == ["theirs", "theirs"]
        boxes = left.bounding_box(), right.bounding_box()
        assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert tuned.asked[1][0][1]["content"] == "mine" and base.asked[1][0][1]["content"] == "theirs"


@pytest.mark.slow
def test_a_reply_is_shown_as_it_grows_can_be_stopped_and_is_forgotten(browser, page_files):  # noqa: F811
    model = ScriptedModel(["word " * 500, "short"], pause=0.02)
    with served([model], page_files) as address, opened(browser, address) as page:
        ask(page, "First?")
        page.get_by_text("word word word").wait_for()
        assert page.get_by_role("button", name="Send").is_disabled()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped.").wait_for()
        assert 10 < len(page.locator(".reply").inner_text()) < 2000 and model.tickets[0].cancelled.is_set()
        page.get_by_role("button", name="New conversation").click()
        page.get_by_text("Nothing was asked yet.").wait_for()
        page.get_by_label("Message", exact=True).fill("Second?")
        page.get_by_label("Message", exact=True).press("Enter")
        page.get_by_text("short").first.wait_for()
        assert len(model.asked[1][0]) == 1, "nothing is left of the first conversation"


@pytest.mark.slow
def test_a_visitor_who_leaves_ends_the_reply(browser, page_files):  # noqa: F811
    model = ScriptedModel(["word " * 5000], pause=0.02)
    with served([model], page_files) as address:
        with opened(browser, address) as page:
            ask(page, "First?")
            page.get_by_text("word word word").wait_for()
        assert model.tickets[0].cancelled.wait(20)


@pytest.mark.slow
def test_an_example_is_filled_in_and_its_answer_shown(browser, page_files, tmp_path):  # noqa: F811
    (tmp_path / "run").mkdir()
    file, thumbnail = tmp_path / "run" / "a.jpg", page_files / "thumbnail.jpg"
    for path in (file, thumbnail):
        Image.new("RGB", (40, 40), RED).save(path)
    recorded = (("before training", "Bob"), ("after training", "Ann"))
    example = Example("rows.jsonl, row 3", "Who is it?", "{question} Briefly.", (file,), thumbnail, ("Ann",), recorded)
    model = ScriptedModel(["Ann."])
    with served([model], page_files, [example]) as address, opened(browser, address) as page:
        page.get_by_role("button", name="Who is it?").click()
        page.get_by_role("button", name="rows.jsonl, row 3", pressed=True).wait_for()
        assert page.get_by_label("Message", exact=True).input_value() == "Who is it?"
        page.get_by_role("button", name="Send").click()
        page.get_by_text("Right answer").wait_for()
        assert page.locator(".recorded dd").all_inner_texts() == ["Ann", "Bob", "Ann"]
    assert model.asked[0][0][0]["content"][-1]["text"] == "Who is it? Briefly."


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_screen(width, browser, page_files):  # noqa: F811
    models = [ScriptedModel(["unbroken" * 60], title="a/very/long/" * 12) for _ in range(2)]
    with served(models, page_files) as address, opened(browser, address, width=width) as page:
        upload(page, (f"{'long-name' * 12}.png", png((9, 9, 9), (900, 30))), ("scan.pdf", pdf([RED] * 5)))
        page.get_by_text("Pictures, 1 in the message").wait_for()
        ask(page, "unbroken" * 60)
        page.locator(".reply").nth(1).wait_for()
        page.get_by_role("button", name="Send", disabled=False).wait_for()
        wide = page.evaluate(
            "() => [...document.querySelectorAll('.gradio-container *')]"
            ".filter(one => one.getBoundingClientRect().right > window.innerWidth + 1 && one.offsetParent)"
            ".map(one => one.outerHTML.slice(0, 200))"
        )
        assert not wide and page.evaluate("document.documentElement.scrollWidth") <= width
