"""`finetune chat` on a GGUF folder: what it says is what the same checkpoint says in PyTorch."""

import io

import pytest
from gguf_for_tests import KNOWN, NANO, UNAVAILABLE, exported

from finetune.chat.terminal_chat import chat
from finetune.errors import UserError

pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))

PAGES = [KNOWN / "images" / "test" / f"00000{number}.png" for number in range(2)]


@pytest.fixture
def lines(monkeypatch):
    return lambda *said: monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(said) + "\n"))


def test_several_turns_are_those_of_pytorch(lines, capsys):
    replies = {}
    for model in (str(NANO), str(exported())):
        lines(
            f"/image {PAGES[0]}",
            "The shop, please.",
            "And the total?",
            "/new",
            f"/image {PAGES[1]}",
            "The shop?",
            "/quit",
        )
        chat(model, max_new_tokens=24)
        said = capsys.readouterr()
        replies[model] = said.out.splitlines()
    ours, theirs = replies.values()
    assert theirs == ours and len(ours) == 3 and ours[0] == "Stone Deli"
    assert "model-f16.gguf: 4.1 MB of weights in the file's mapping" in said.err


def test_a_conversation_that_is_too_long_is_refused(lines, capsys):
    lines("word " * 2000, "Hello", "/quit")
    chat(str(exported()), max_new_tokens=4)
    said = capsys.readouterr()
    assert "and the model takes 2,048: start a new one" in said.err
    assert len(said.out.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"dtype": "float32"}, "--dtype has no effect on .*, whose language model is a GGUF file"),
        ({"quantization": "nf4"}, "--quantization has no effect on"),
        ({"base": str(NANO)}, "--base has no effect on"),
    ],
)
def test_arguments_without_effect_are_refused(given, reason):
    with pytest.raises(UserError, match=reason):
        chat(str(exported()), once="Hello", **given)


def test_threads_are_llamacpps():
    with pytest.raises(UserError, match="--threads has no effect with PyTorch"):
        chat(str(NANO), once="Hello", threads=2)
