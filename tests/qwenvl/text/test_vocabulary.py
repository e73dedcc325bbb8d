"""Reading `qwen.tiktoken`: what is accepted, what is refused and how; vocabularies other than the published one."""

import base64
import pickle

import pytest

from qwenvl.errors import InputError
from qwenvl.text.tokenizer import QwenVLTokenizer
from qwenvl.text.vocabulary import CONTROL_TOKENS, Vocabulary

SINGLE_BYTES = [bytes([byte]) for byte in range(256)]


def lines_of(tokens: list[bytes]) -> list[bytes]:
    return [base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(tokens)]


def file_of(tokens: list[bytes], newline: bytes = b"\n") -> bytes:
    return newline.join(lines_of(tokens)) + newline


def test_control_tokens_follow_the_last_rank():
    vocabulary = Vocabulary(file_of([*SINGLE_BYTES, b"ab"]))
    assert len(CONTROL_TOKENS) == len(set(CONTROL_TOKENS)) == 217
    assert vocabulary.control_tokens == {token: 257 + i for i, token in enumerate(CONTROL_TOKENS)}
    assert vocabulary.control_tokens["<img>"] == 257 + 214
    assert len(vocabulary) == 257 + 217


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("tail", [b"", b"\n", b"\r\n", b"  \n\n"])
def test_line_endings_and_blank_lines_do_not_matter(newline, tail):
    source = newline.join(lines_of([*SINGLE_BYTES, b"ab"])) + tail
    assert Vocabulary(source).encode("ab", ()) == [256]


def test_the_order_of_the_lines_does_not_matter():
    source = b"\n".join(reversed(lines_of([*SINGLE_BYTES, b"ab", b"abc"])))
    assert Vocabulary(source).encode("xabc", ()) == [ord("x"), 257]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"!!!! 1", "line 2: expected `base64(token) rank`"),
        (b"Yg=", "line 2: expected `base64(token) rank`"),
        (b"Yg== x", "line 2: expected `base64(token) rank`"),
        (b"Yg== -1", "line 2: expected `base64(token) rank`"),
        (b"Yg== 1 1", "line 2: expected `base64(token) rank`"),
        (b" 1", "line 2: expected `base64(token) rank`"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"<!doctype html>", "line 2: expected `base64(token) rank`"),
        (b"Yg== 0", "line 2: rank 0 was given already, in line 1"),
        (b"YQ== 1", "line 2: token b'a' was given already, in line 1"),
        (b"Yg== 3", "line 3: rank 2 is given, but rank 1 is missing"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, expected):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(b"YQ== 0\n" + line + b"\nYw== 2\n")
    with pytest.raises(InputError) as raised:
        QwenVLTokenizer(path)
    assert str(path) in str(raised.value)
    assert expected in str(raised.value)


def test_an_empty_file_is_refused():
    with pytest.raises(InputError, match="empty"):
        Vocabulary(b"\r\n")


def test_a_text_that_needs_a_missing_byte_is_refused():
    vocabulary = Vocabulary(file_of([b"a", b"b", b"ab", b"\xe4"]))
    assert vocabulary.encode("abba", ()) == [2, 1, 0]
    for text, byte in [("abz", "0x7a"), ("z", "0x7a"), ("ä", "0xc3"), ("ab<img>", "0x3c")]:
        with pytest.raises(InputError, match=byte):
            vocabulary.encode(text, ())
    assert vocabulary.encode("ab<img>", ("<img>",)) == [2, vocabulary.control_tokens["<img>"]]


def test_a_missing_byte_inside_a_known_token_is_no_obstacle():
    # "z" alone has no token; "az" has one, which tiktoken finds before it needs "z".
    assert Vocabulary(file_of([b"a", b"az"])).encode("az", ()) == [1]


def test_a_token_spelled_like_a_control_token_is_not_mistaken_for_it():
    vocabulary = Vocabulary(file_of([*SINGLE_BYTES, b"<b", b"ox", b"<box", b"<box>", "␛<box>".encode()]))
    ids = vocabulary.encode("<box>", ())
    assert max(ids) < vocabulary.ordinary_size
    assert len(vocabulary.token_ids) == len(vocabulary.token_strings) == len(vocabulary)
    assert vocabulary.token_ids["<box>"] == vocabulary.control_tokens["<box>"]
    assert vocabulary.token_strings[259] == "␛<box>"
    assert vocabulary.decode([259, vocabulary.control_tokens["<box>"]], "strict") == "<box><box>"


def test_pickle_holds_the_file_alone():
    source = file_of([*SINGLE_BYTES, b"ab"])
    vocabulary = Vocabulary(source, name="/home/somebody/qwen.tiktoken")
    fresh = pickle.dumps(vocabulary)
    assert vocabulary.token_ids  # building the tables must not change what is pickled
    assert pickle.dumps(vocabulary) == fresh
    assert len(fresh) < len(source) + 200
    assert pickle.loads(fresh).encode("abc", ()) == [256, ord("c")]
