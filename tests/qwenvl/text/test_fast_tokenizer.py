"""`qwen.tiktoken` as a tokenizer of the library `tokenizers`; its files are tested in finetune/export."""

import base64
import copy
import pickle

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from qwenvl import QwenVLTokenizer
from qwenvl.text.fast_tokenizer import fast_tokenizer, merged_pairs
from qwenvl.text.vocabulary import GROUNDING_TOKENS, Vocabulary


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny_folder) -> QwenVLTokenizer:
    return QwenVLTokenizer.from_pretrained(tiny_folder)


def test_the_tokenizer_streams_through_the_library(tiny_tokenizer):
    """As Transformers' server does; a character of several tokens comes when it is whole."""
    text = "Größe 漢字 👩‍💻\n<ref>the dog</ref><box>(1,2),(3,4)</box>"
    ids = tiny_tokenizer.encode_text(text, tokens=GROUNDING_TOKENS)
    stream = DecodeStream([], skip_special_tokens=False)
    pieces = [stream.step(tiny_tokenizer._tokenizer, token) for token in ids]
    assert "".join(piece for piece in pieces if piece is not None) == text
    assert None in pieces, "a character of one token alone would prove less"
    assert not any("\ufffd" in piece for piece in pieces if piece is not None)
    # A reply keeps its boxes, and loses the token that ended it.
    stream, ended = DecodeStream([], skip_special_tokens=True), [*ids, tiny_tokenizer.im_end_id]
    pieces = [stream.step(tiny_tokenizer._tokenizer, token) for token in ended]
    assert "".join(piece for piece in pieces if piece is not None) == text


def test_the_librarys_tokenizer_is_no_part_of_ours(tiny_folder, tmp_path):
    tokenizer = QwenVLTokenizer.from_pretrained(tiny_folder)
    before, state = pickle.dumps(tokenizer), set(vars(tokenizer))
    assert isinstance(tokenizer._tokenizer, Tokenizer)
    assert pickle.dumps(tokenizer) == before and set(vars(tokenizer)) == state
    assert not tokenizer.is_fast
    tokenizer.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "qwen.tiktoken",
        "tokenizer_config.json",
    ]


def test_it_is_built_once_for_a_vocabulary(tiny_folder):
    tokenizer, another = (QwenVLTokenizer.from_pretrained(tiny_folder) for _ in range(2))
    built = tokenizer._tokenizer
    for other in (tokenizer, another, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other._tokenizer is built


def test_a_token_that_merging_never_reaches_is_still_found():
    """tiktoken looks a whole word up before it merges: `abc` is a token though neither `ab` nor `bc` is."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"abc"]
    source = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    vocabulary = Vocabulary(source)
    tokenizer = fast_tokenizer(vocabulary)
    assert merged_pairs(vocabulary) == []
    for text in ("abc", " abc", "abcd", "x abc"):
        assert tokenizer.encode(text).ids == vocabulary.encode(text, ())
    assert vocabulary.encode("abc", ()) == [256]


def test_an_ordinary_token_spelled_like_a_control_token_is_refused():
    tokens = [bytes([byte]) for byte in range(256)] + [b"<box>"]
    source = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    with pytest.raises(ValueError, match="ordinary token b'<box>'"):
        fast_tokenizer(Vocabulary(source))
