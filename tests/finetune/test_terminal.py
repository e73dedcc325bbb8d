"""What is printed can do nothing to the terminal."""

import pytest

from finetune.terminal import LABEL_WIDTH, labelled, say, say_nothing, terminal_line, terminal_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", "␛]0;title␇"),
        ("\x1b[2J\x1b[H", "␛[2J␛[H"),
        ("a\rb\bc\0", "a␍b␈c␀"),
        ("\x7f\x9b31m", "␡<U+009B>31m"),
        ("\u202eabc\u2066", "<U+202E>abc<U+2066>"),
        ("a\u2028b", "a<U+2028>b"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("通义千问 é 🙂 ‍", "通义千问 é 🙂 ‍"),
    ],
)
def test_control_characters_become_visible(text, shown):
    assert terminal_text(text) == shown


def test_no_control_character_is_left():
    shown = terminal_text("".join(map(chr, range(0x3000))))
    assert [char for char in shown if not char.isprintable() and (char < " " or "\x7f" <= char < "\xa0")] == [
        "\t",
        "\n",
    ]


def test_pieces_come_out_as_the_whole():
    text = "a\x1b[1m\r\nb\u202e"
    assert "".join(map(terminal_text, text)) == terminal_text(text)


def test_one_line():
    assert terminal_line(" a\n  b\x1b\tc ") == "a b␛ c"


def test_labelled_lines_are_aligned(capsys):
    say("model", "examples/nano")
    say("", "\x1b continued")
    say("Next:")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["model       examples/nano", " " * LABEL_WIDTH + " ␛ continued", "Next:"]
    assert labelled("eleven char", 3) == "eleven char 3"
    say_nothing("model", "examples/nano")
    assert capsys.readouterr() == ("", "")
