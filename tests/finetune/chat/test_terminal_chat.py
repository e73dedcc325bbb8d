"""A conversation with the tiny checkpoint: its turns, images, saved rows, and what reaches the terminal."""

import io
import json
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from recipes_for_tests import IMAGES, TINY
from scripted_decoder import ScriptedDecoder

from finetune.chat import terminal_chat as chat_module
from finetune.chat.conversation_rows import append_row
from finetune.chat.terminal_chat import TerminalChat, open_conversation
from finetune.data.samples import Samples
from finetune.errors import UserError
from finetune.recipe.sources import Source
from finetune.replies.model_style import find_use
from finetune.terminal import terminal_text
from qwenvl import ImageError, load_model, load_processor
from qwenvl.checkpoint.record import ModelRecord
from qwenvl.text.chat import render_chat, render_prompt
from qwenvl.views import Views


@pytest.fixture(scope="module")
def model():
    return load_model(TINY)


@pytest.fixture
def conversation(model):
    conversation = open_conversation(find_use(str(TINY)), model)
    conversation.max_new_tokens = 12
    return conversation


@pytest.fixture
def terminal(conversation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return TerminalChat(conversation, None)


def typed(terminal, monkeypatch, *lines: str):
    """Talk as if these lines were typed."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    terminal.talk("tiny")


def scripted(conversation, *replies: str):
    """Let the model say these things, one a turn; one that ends in ^C is stopped there."""
    tokenizer = conversation.tokenizer
    script = iter(replies)
    asked = []
    interrupt_at = []

    def say(row):
        asked.append((list(row.ids), torch.stack(list(row.features)) if row.features else None))
        reply = next(script)
        ids = tokenizer.encode_text(reply.removesuffix("^C"), tokens=("<ref>", "</ref>", "<box>", "</box>"))
        interrupt_at[:] = [len(ids)] if reply.endswith("^C") else []
        return ids

    def before_step(numbers):
        interrupt_at[:] = [left - 1 for left in interrupt_at]
        if interrupt_at == [0]:
            raise KeyboardInterrupt

    conversation.decoder = ScriptedDecoder(
        say, tokenizer.im_end_id, conversation.config.vocab_size, context=conversation.decoder.context
    )
    conversation.decoder.before_step = before_step
    conversation.max_new_tokens = 512
    return asked


def test_a_reply_is_what_generate_gives(conversation, model):
    conversation.add_image(IMAGES[0])
    pieces = []
    answer = conversation.ask("What is this?", pieces.append)
    parts = [{"type": "image", "image": str(IMAGES[0])}, {"type": "text", "text": "What is this?"}]
    inputs = load_processor(TINY).apply_chat_template(
        [{"role": "user", "content": parts}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, length:]
    expected = conversation.tokenizer.decode(ids, skip_special_tokens=True, keep_grounding=True)
    assert answer.text == expected and len(expected) > 3
    assert "".join(pieces).replace("\ufffd", "") == expected.replace("\ufffd", "")
    assert (answer.prompt_tokens, answer.ended, answer.stopped) == (length, False, False)


def test_a_turn_computes_what_is_new(conversation):
    conversation.add_image(IMAGES[0])
    first = conversation.ask("What is this?")
    second = conversation.ask("And the total?")
    known = conversation.decoder.reused[0]
    assert known > first.prompt_tokens
    afresh = open_conversation(find_use(str(TINY)), conversation.model)
    afresh.max_new_tokens = 12
    afresh.messages, afresh.images = conversation.messages[:2], conversation.images
    assert afresh.ask("And the total?").text == second.text
    assert afresh.decoder.reused == [0]


def test_where_memory_is_short_what_is_kept_goes_first(conversation, monkeypatch):
    scripted(conversation, "One.", "Two.")
    decoder, shortages = conversation.decoder, iter([True, False, True, True])

    def short(_rows):
        if next(shortages, False):
            raise torch.OutOfMemoryError("none left")

    decoder.before_join = short
    monkeypatch.setattr(decoder, "drop_kept", lambda: True)
    assert conversation.ask("First?").text == "One."
    with pytest.raises(torch.OutOfMemoryError):
        conversation.ask("Second?")
    assert not decoder.live and len(conversation.messages) == 2


def test_turns_build_on_each_other_and_each_image_is_encoded_once(conversation, model, monkeypatch):
    asked = scripted(conversation, "A receipt.", "12.40", "A form.")
    encoded = []
    encode = model.get_image_features
    monkeypatch.setattr(model, "get_image_features", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    conversation.system = "Be short."
    conversation.add_image(IMAGES[0])
    conversation.ask("What is this?")
    conversation.ask("The total?")
    conversation.add_image(IMAGES[1])
    conversation.ask("And this?")
    image = [{"type": "image"}]
    expected = render_chat(
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [*image, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": "A receipt."},
            {"role": "user", "content": "The total?"},
            {"role": "assistant", "content": "12.40"},
            {"role": "user", "content": [*image, {"type": "text", "text": "And this?"}]},
        ],
        conversation.tokenizer,
        add_generation_prompt=True,
    ).ids
    ids, features = asked[-1]
    assert ids == expected
    assert encoded == [1, 1] and features.shape == (2, 256, 256)
    processor = load_processor(TINY)
    both = processor.image_processor([Image.open(path) for path in IMAGES[:2]], return_tensors="pt")["pixel_values"]
    assert torch.allclose(features, encode(both), atol=1e-5)


def test_a_stopped_reply_is_kept_and_the_chat_goes_on(terminal, conversation, monkeypatch, capsys):
    scripted(conversation, "The total is^C", "12.40")
    typed(terminal, monkeypatch, "The total?", "Go on")
    told = capsys.readouterr()
    assert told.out == "The total is\n12.40\n" and "(stopped)" in told.err
    contents = [message["content"] for message in conversation.messages]
    assert contents == ["The total?", "The total is", "Go on", "12.40"]


def test_a_turn_without_a_reply_is_not_kept_and_its_images_wait(terminal, conversation, monkeypatch, capsys):
    scripted(conversation, "^C", "", "Yes.")
    typed(terminal, monkeypatch, f"/image {IMAGES[0]}", "One?", "Two?", "Three?")
    assert capsys.readouterr().err.count("(no reply; the message is forgotten)") == 2
    (user, reply) = conversation.messages
    assert user["content"][1]["text"] == "Three?" and reply["content"] == "Yes."
    assert len(conversation.images) == 1 and not conversation.waiting


def test_control_characters_do_not_reach_the_terminal(terminal, conversation, monkeypatch, capsys):
    hostile = "\x1b]0;owned\x07 \x9b31m \u202etxt.exe\r\x08 ok\ttab\nline"
    scripted(conversation, hostile)
    typed(terminal, monkeypatch, "Hello")
    assert capsys.readouterr().out == "␛]0;owned␇ <U+009B>31m <U+202E>txt.exe␍␈ ok\ttab\nline\n"
    assert terminal_text("👩‍💻 naïve مرحبا") == "👩‍💻 naïve مرحبا"
    # A conversation holds what was said, to the letter.
    assert conversation.messages[1]["content"] == hostile


def test_once_gives_a_pipe_the_reply_as_it_is(terminal, conversation, monkeypatch, capsys):
    scripted(conversation, "a\x1b[0mb", "stop^C")
    terminal.once("Hello")
    assert capsys.readouterr().out == "a\x1b[0mb\n"
    with pytest.raises(KeyboardInterrupt):
        terminal.once("Hello")


def test_boxes_are_told_in_pixels_and_drawn(terminal, conversation, monkeypatch, capsys, tmp_path):
    Image.new("RGB", (400, 200), "white").save(tmp_path / "street.png")
    reply = "<ref>the red car</ref><box>(100,250),(500,750)</box> is here."
    asked = scripted(conversation, reply, reply, "Yes.")
    typed(terminal, monkeypatch, f"/image '{tmp_path}/street.png'", "Where is it?", "Again?", "Sure?")
    told = capsys.readouterr()
    assert "  the red car: (40, 50) (200, 150)\n" in told.err and "drawn: street_boxes-2.png" in told.err
    drawn = Image.open(tmp_path / "street_boxes.png").convert("RGB")
    assert drawn.size == (400, 200) and drawn.getpixel((40, 100)) != (255, 255, 255)
    # In the history they are tokens again, as the model wrote them.
    ids = asked[-1][0]
    control = conversation.tokenizer.control_tokens
    assert ids.count(control["<box>"]) == 2 and ids.count(control["</ref>"]) == 2


def test_with_views_pictures_have_numbers_and_boxes_are_of_the_whole_image(
    terminal, conversation, monkeypatch, capsys, tmp_path
):
    for name, size in {"street.png": (400, 200), "yard.png": (300, 100)}.items():
        Image.new("RGB", size, "white").save(tmp_path / name)
    conversation.views = Views(True, (1, 2), 0.0)
    asked = scripted(conversation, "A street.", "<ref>the dog</ref><box>(100,250),(500,750)</box>")
    typed(terminal, monkeypatch, "/image street.png", "What is it?", "/image yard.png", "Where is the dog?")
    told = capsys.readouterr().err
    assert "street.png, 400 x 200 pixels, pictures 1 to 3: 1 image(s)" in told
    assert "yard.png, 300 x 100 pixels, pictures 4 to 6: 1 image(s)" in told
    assert "  the dog: (30, 25) (150, 75)\n" in told
    assert Image.open(tmp_path / "yard_boxes.png").size == (300, 100)
    assert [features.shape[0] for _, features in asked] == [3, 6]
    assert torch.equal(asked[0][1], asked[1][1][:3])
    pictures = conversation.views.pictures(str(tmp_path / "yard.png"))
    pixels = conversation.image_processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        assert torch.allclose(asked[1][1][3:], conversation.model.get_image_features(pixels), atol=1e-5)
    assert "Picture 6:<img>" in conversation.tokenizer.decode(asked[1][0])


def test_markup_that_is_typed_is_markup(conversation, monkeypatch):
    asked = scripted(conversation, "Yes.", "No.")
    conversation.ask("Is <ref>the dog</ref><box>(1,2),(30,40)</box> asleep?")
    conversation.ask("Is <box> a tag?")
    assert conversation.messages[0]["grounding"] is True and "grounding" not in conversation.messages[2]
    assert asked[-1][0].count(conversation.tokenizer.control_tokens["<box>"]) == 1


def test_markup_is_text_to_a_model_that_was_trained_on_it_as_text(model, monkeypatch, capsys):
    use = find_use(str(TINY))
    question = "Is <ref>the dog</ref> asleep?"
    tokens = {}
    for name, fields in {
        "text": {"labels": "assistant", "prompts": {"messages": ()}},
        "tokens": {"labels": "assistant", "grounding": True},
        "rows of boxes": {"labels": "assistant", "prompts": {"grounding": ("<ref>{phrase}</ref>",)}},
        "nothing recorded": {},
    }.items():
        conversation = open_conversation(replace(use, record=ModelRecord(chat_format="chatml", **fields)), model)
        asked = scripted(conversation, "Yes.", "<ref>the dog</ref>")
        TerminalChat(conversation, None).once(question)
        said = "in messages are text to this model" in capsys.readouterr().err
        tokens[name] = asked[-1][0].count(conversation.tokenizer.control_tokens["<ref>"]), said
        conversation.ask("Who?")
        assert ("grounding" in conversation.messages[-1]) is not said
    assert tokens.pop("text") == (0, True)
    assert set(tokens.values()) == {(1, False)}


def test_a_base_model_completes_raw_prompts(model, monkeypatch):
    conversation = open_conversation(find_use(str(TINY), style="base"), model)
    asked = scripted(conversation, " a receipt", " 12")
    conversation.add_image(IMAGES[0])
    conversation.ask("What is this? Answer:")
    conversation.ask("1, 2, 3, 10, 11,")
    content = [{"type": "image"}, {"type": "text", "text": "What is this? Answer:"}]
    assert asked[0][0] == render_prompt(content, conversation.tokenizer).ids
    assert asked[1][0] == conversation.tokenizer.encode_text("1, 2, 3, 10, 11,") and asked[1][1] is None
    assert conversation._stop_ids == (514, 513, 512)  # those of the tiny checkpoint's own config


def test_an_adapter_replies_with_what_it_learned(conversation, tmp_path):
    torch.manual_seed(0)
    adapted = get_peft_model(
        load_model(TINY), LoraConfig(r=4, target_modules=["c_attn", "w1"], init_lora_weights=False)
    )
    adapted.peft_config["default"].base_model_name_or_path = str(TINY)
    adapted.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    with_adapter = open_conversation(find_use(str(tmp_path)), loaded)
    with_adapter.max_new_tokens = 12
    for each in (conversation, with_adapter):
        each.add_image(IMAGES[0])
    reply = with_adapter.ask("What is this?").text
    assert reply != conversation.ask("What is this?").text
    ids = render_chat(with_adapter.messages[:1], conversation.tokenizer, add_generation_prompt=True).ids
    pixels = load_processor(TINY).image_processor(Image.open(IMAGES[0]), return_tensors="pt")["pixel_values"]
    generated = loaded.generate(
        input_ids=torch.tensor([ids]), pixel_values=pixels, max_new_tokens=12, do_sample=False, pad_token_id=512
    )
    assert (
        conversation.tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=True, keep_grounding=True) == reply
    )


def test_sampling_draws_and_greedy_does_not(conversation):
    greedy = {conversation.ask("Hello").text for _ in range(2) if not conversation.forget()}
    conversation.temperature = 2.0
    drawn = {conversation.ask("Hello").text for _ in range(3) if not conversation.forget()}
    assert len(greedy) == 1 and len(drawn) == 3


def test_a_long_conversation_is_warned_of_once_and_ends_at_the_model_s_limit(terminal, monkeypatch, capsys):
    conversation = terminal.conversation
    scripted(conversation, *["Yes."] * 4)
    typed(terminal, monkeypatch, "long " * 400, "more", "/new", "short", "long " * 4000, "still here")
    told = capsys.readouterr()
    assert told.err.count("the model was trained on up to 700") == 1
    assert "and the model takes 2,048: start a new one" in told.err
    assert told.out == "Yes.\n" * 4
    assert conversation.messages[-2]["content"] == "still here"


def test_what_cannot_be_done_is_told_and_the_chat_goes_on(terminal, monkeypatch, capsys, tmp_path):
    conversation = terminal.conversation
    scripted(conversation, "Yes.")
    (tmp_path / "bad.png").write_bytes(b"no image")
    lines = [
        "/image",
        "/image none.png",
        "/image bad.png",
        "/bogus",
        "/save out.jsonl",
        "/save",
        "/help",
        "",
        "half \ud800",
    ]
    monkeypatch.setattr(sys, "stdin", _Lines([*lines, " /etc is a folder", "/save out.txt", "/quit", "never"]))
    terminal.talk("tiny")
    told = capsys.readouterr()
    for text in ("/image needs a file", "none.png", "bad.png", "There is no /bogus", "no reply to save yet"):
        assert text in told.err
    for text in ("/save needs a file", "/new          forget", "half a surrogate pair", "ends in .jsonl"):
        assert text in told.err
    assert [message["content"] for message in conversation.messages] == ["/etc is a folder", "Yes."]
    assert not conversation.waiting


class _Lines:
    """Input with what a StringIO cannot hold."""

    def __init__(self, lines):
        self.lines = iter(lines)

    def isatty(self):
        return False

    def readline(self, *_):
        return next(self.lines) + "\n"


def test_ctrl_c_at_the_prompt_does_not_leave(terminal, monkeypatch, capsys):
    script = iter([KeyboardInterrupt, EOFError])

    def read():
        raise next(script)

    monkeypatch.setattr(chat_module, "read_line", read)
    terminal.talk("tiny")
    assert "Ctrl-D or /quit leaves." in capsys.readouterr().err


def test_a_saved_conversation_trains_on_what_was_said(terminal, monkeypatch, tmp_path, capsys):
    conversation = terminal.conversation
    box = "<ref>total</ref><box>(1,2),(30,40)</box>"
    scripted(conversation, "A receipt.", box, "Again.")
    near = tmp_path / "data" / "near.png"
    near.parent.mkdir()
    Image.new("RGB", (30, 20), "red").save(near)
    conversation.system = "Be short."
    lines = [f"/image {IMAGES[0]}", f"/image {near}", "What are these?", "Where?", "/save data/rows.jsonl"]
    typed(terminal, monkeypatch, *lines, "/new", "Again?", "/save data/rows.jsonl")
    assert "data/rows.jsonl, row 2" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "data" / "rows.jsonl").read_text().splitlines()]
    assert rows[0]["images"] == [f"rows_images/{IMAGES[0].name}", "near.png"]
    assert (tmp_path / "data" / "rows_images" / IMAGES[0].name).read_bytes() == IMAGES[0].read_bytes()

    samples = Samples([Source(path=str(tmp_path / "data" / "rows.jsonl"), format="messages")])
    image = {"type": "image"}
    said = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [image, image, {"type": "text", "text": "What are these?"}]},
        {"role": "assistant", "content": "A receipt."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": box, "grounding": True},
    ]
    tokenizer = conversation.tokenizer
    assert render_chat(samples[0].messages, tokenizer).ids == render_chat(said, tokenizer).ids
    sources = render_chat(samples[0].messages, tokenizer).images
    assert sources == [str(tmp_path / "data" / name) for name in rows[0]["images"]]
    assert samples[1].messages[1]["content"] == "Again?"


def test_saved_images_of_one_name_stay_apart(tmp_path):
    for folder, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / folder / "x.png")
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "r.jsonl").write_text('{"messages": []}')  # its last line is not ended

    def said(*folders):
        parts = [{"type": "image", "image": str(tmp_path / folder / "x.png")} for folder in folders]
        return [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes."}]

    assert append_row(rows / "r.jsonl", said("a", "b")) == 2
    assert append_row(rows / "r.jsonl", said("b")) == 3
    written = [json.loads(line) for line in (rows / "r.jsonl").read_text().splitlines()]
    assert [row.get("images") for row in written] == [
        None,
        ["r_images/x.png", "r_images/x-2.png"],
        ["r_images/x-2.png"],
    ]


def test_text_only_and_unreadable_images(conversation, tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG no")
    with pytest.raises(ImageError):
        conversation.add_image(tmp_path / "x.png")
    conversation.image_processor = None
    with pytest.raises(UserError, match="text-only"):
        conversation.add_image(IMAGES[0])
