"""The pieces of a reply are its text, however its tokens cut characters and stop texts."""

import random

import pytest

from finetune.replies.reply_text import reply_text, stop_place
from finetune.replies.text_stream import TextStream, TokenBytes

TEXTS = ["Grüße, 你好 😀!", " \n\n 12.50\nQuestion: no", "aaabab aabaab", "<ref>the dog</ref><box>(1,2),(3,4)</box>"]


def streamed(stream: TextStream, ids) -> list[str]:
    pieces = []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.end()]


@pytest.mark.parametrize("stops", [(), ("\n", "Question"), ("aabaab", "abab"), ("你好 😀",), ("好x", "Grüße?")])
def test_pieces_are_the_text(tiny_processor, stops):
    tokenizer = tiny_processor.tokenizer
    for text in TEXTS:
        ids = tokenizer.encode_text(text, tokens=("<ref>", "</ref>", "<box>", "</box>"))
        stream = TextStream(TokenBytes(tokenizer), stops)
        pieces = streamed(stream, ids)
        place = stop_place(text, stops)
        assert "".join(pieces) == stream.text == text[:place] and stream.stopped == (place is not None)
        assert not any("\ufffd" in piece for piece in pieces)
        if place is not None:  # at the first token that spells it
            count = len(pieces)
            assert stop_place(reply_text(tokenizer, ids[: count - 1]), stops) is None


def test_what_may_be_a_stop_text_waits(tiny_processor):
    tokenizer = tiny_processor.tokenizer
    tokens = {character: tokenizer.encode_text(character)[0] for character in "abc\n"}
    stream = TextStream(TokenBytes(tokenizer), ("abc",))
    assert [stream.add(tokens[character]) for character in "aabb"] == ["", "a", "", "abb"]
    assert [stream.add(tokens[character]) for character in "ab"] == ["", ""] and stream.end() == "ab"
    stream = TextStream(TokenBytes(tokenizer), ("\n",))
    assert [stream.add(tokens[character]) for character in "\n\na\nb"] == ["\n", "\n", "a", "", ""]
    assert stream.stopped and stream.end() == "" and stream.text == "\n\na"


def test_any_tokens_are_as_decoded_at_once(tiny_processor):
    """Bytes that are no characters, ids without a token, control tokens."""
    tokenizer, dice = tiny_processor.tokenizer, random.Random(0)
    table = TokenBytes(tokenizer)
    odd = [token for token in range(len(tokenizer)) if b"\xff" in table[token] or max(table[token], default=0) > 127]
    for _ in range(200):
        ids = [dice.choice(odd) if dice.random() < 0.6 else dice.randrange(len(tokenizer) + 5) for _ in range(12)]
        stream = TextStream(table)
        assert "".join(streamed(stream, ids)) == stream.text == reply_text(tokenizer, ids)
