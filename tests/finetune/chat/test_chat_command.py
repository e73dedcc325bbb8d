"""`finetune chat --once`: the reply to stdout, the rest to stderr, and what is refused before weights load."""

import argparse

import pytest
from PIL import Image
from recipes_for_tests import IMAGES, TINY, finetune

from finetune.chat import terminal_chat as chat_module
from finetune.chat.terminal_chat import chat
from finetune.commands import chat as command
from finetune.errors import UserError
from finetune.replies.model_style import find_use
from qwenvl import ImageError


@pytest.fixture
def no_weights(monkeypatch):
    def loaded(*arguments, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(chat_module, "load_model", loaded)


def test_the_reply_alone_is_on_stdout(tmp_path):
    question = ["--once", "What is this?", "--max-new-tokens", "6"]
    done = finetune("chat", TINY, "--image", IMAGES[0], *question, cwd=tmp_path)
    conversation = chat_module.open_conversation(find_use(str(TINY)), chat_module.load_model(TINY))
    conversation.max_new_tokens = 6
    conversation.add_image(IMAGES[0])
    assert done.stdout == conversation.ask("What is this?").text + "\n"
    assert "cut at 6 tokens" in done.stderr
    assert not list(tmp_path.iterdir())


def test_once_draws_where_it_is_asked_to(tmp_path, monkeypatch, capsys):
    """The weights are random: the reply is put into the model's mouth."""
    answer = chat_module.Answer("<ref>x</ref><box>(0,0),(500,500)</box>", 10, True, False)

    def ask(self, text, on_text=None):
        self.images, self.waiting = self.waiting, []
        return answer

    monkeypatch.setattr(chat_module.Conversation, "ask", ask)
    monkeypatch.chdir(tmp_path)
    chat(str(TINY), images=[IMAGES[0]], once="Where?")
    assert not list(tmp_path.iterdir())
    chat(str(TINY), images=[IMAGES[0]], once="Where?", boxes="found.png")
    told = capsys.readouterr()
    assert told.out == answer.text + "\n" + answer.text + "\n"
    assert "drawn: found.png" in told.err
    assert Image.open(tmp_path / "found.png").size == Image.open(IMAGES[0]).size


def test_wrong_input_is_told_before_weights_load(no_weights, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"bad\.png"):
        chat(str(TINY), images=[tmp_path / "bad.png"], once="What?")
    with pytest.raises(UserError, match=r"ends in \.png or \.jpg"):
        chat(str(TINY), once="What?", boxes=tmp_path / "boxes.txt")
    with pytest.raises(UserError, match="there is no folder"):
        chat(str(TINY), once="What?", boxes=tmp_path / "none" / "boxes.png")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        chat(str(tmp_path / "none"), once="What?")


def test_a_base_model_has_no_system_message(no_weights, tmp_path):
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text((TINY / name).read_text().replace('"chatml"', '"raw"'))
    (tmp_path / "model.safetensors").symlink_to(TINY / "model.safetensors")
    with pytest.raises(UserError, match="is a base model"):
        chat(str(tmp_path), once="What?", system="Be short.")


def test_arguments():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = parser.parse_args(["m", "--image", "a.png", "--image", "b.png", "--temperature", "0.7"])
    assert [str(image) for image in given.image] == ["a.png", "b.png"]
    assert (given.temperature, given.max_new_tokens, given.once, given.quantization) == (0.7, 512, None, None)
    for wrong in (
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--max-new-tokens", "0"],
        ["--quantization", "x"],
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(["m", *wrong])
    with pytest.raises(UserError, match="there is no such file"):
        command.run(parser.parse_args(["m", "--image", "none.png"]))
    with pytest.raises(UserError, match="--once is empty"):
        command.run(parser.parse_args(["m", "--once", " "]))
