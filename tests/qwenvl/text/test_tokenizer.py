"""The tokenizer against the published one, and what it promises beyond it: no control token out of ordinary text.

`data/tokenizer.json` holds ids and texts made by running the published tokenizer with the published vocabulary, which
is read from the `dashscope` package of the test extra.
"""

import copy
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from datasets.fingerprint import Hasher
from transformers import TextStreamer

from qwenvl.errors import InputError, MissingFileError
from qwenvl.text.tokenizer import QwenVLTokenizer
from qwenvl.text.vocabulary import CONTROL_TOKENS, GROUNDING_TOKENS, IMAGE_TOKENS

PUBLISHED_VOCABULARY = Path(str(files("dashscope") / "resources" / "qwen.tiktoken"))
ORACLE = json.loads((Path(__file__).parents[2] / "data" / "tokenizer.json").read_text(encoding="utf-8"))
N = 151_643


@pytest.fixture
def tiny_tokenizer(tiny_folder) -> QwenVLTokenizer:
    return QwenVLTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A published folder's tokenizer files, to be changed."""
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, tmp_path / name)
    return tmp_path


def configure(folder: Path, **changes) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


# ---- agreement with the published tokenizer


def test_special_ids(published_tokenizer):
    tokenizer = published_tokenizer
    assert tokenizer.control_tokens.items() >= ORACLE["special_token_ids"].items()
    assert len(tokenizer) == tokenizer.vocab_size == ORACLE["n_vocab"] == N + 217
    assert (tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id) == (N, N + 1, N + 2)
    assert (tokenizer.image_start_id, tokenizer.image_end_id, tokenizer.image_pad_id) == (151857, 151858, 151859)
    assert (tokenizer.image_token, tokenizer.image_token_id) == ("<imgpad>", 151859)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == N
    assert tokenizer.bos_token is None and tokenizer.unk_token is None


@pytest.mark.parametrize("case", [case for case in ORACLE["encode"] if case["ids_special_in_text"] is not None])
def test_ids_with_every_control_token_recognised(published_tokenizer, case):
    text, ids = case["text"], case["ids_special_in_text"]
    assert published_tokenizer(text, split_special_tokens=False)["input_ids"] == ids
    assert published_tokenizer.encode(text, split_special_tokens=False) == ids
    assert published_tokenizer.encode_text(text, tokens=CONTROL_TOKENS) == ids
    assert published_tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("case", [case for case in ORACLE["encode"] if case["ids_grounding_only"] is not None])
def test_ids_with_grounding_recognised(published_tokenizer, case):
    tokens = GROUNDING_TOKENS + IMAGE_TOKENS
    assert published_tokenizer.encode_text(case["text"], tokens=tokens) == case["ids_grounding_only"]


@pytest.mark.parametrize("case", ORACLE["decode"])
def test_decode(published_tokenizer, case):
    assert published_tokenizer.decode(case["ids"]) == case["text"]
    assert published_tokenizer.decode(case["ids"], skip_special_tokens=True) == case["text_skip_special"]


# ---- round trips


def random_texts(count: int) -> list[str]:
    generator = random.Random(0)
    blocks = [(0, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x600, 0x6FF), (0x1100, 0x11FF), (0x4E00, 0x9FFF)]
    blocks += [(0xAC00, 0xD7A3), (0xE000, 0xFFFF), (0x1F300, 0x1FAFF), (0x10000, 0x10FFFF), (0x2000, 0x20FF)]
    texts = []
    for _ in range(count):
        length = generator.randrange(40)
        texts.append("".join(chr(generator.randint(*generator.choice(blocks))) for _ in range(length)))
    return texts


def test_text_comes_back_in_its_composed_form(published_tokenizer, tiny_tokenizer):
    for tokenizer in (published_tokenizer, tiny_tokenizer):
        for text in random_texts(5_000):
            assert tokenizer.decode(tokenizer.encode_text(text), errors="strict") == unicodedata.normalize("NFC", text)


def test_the_transformers_surface_agrees_with_encode_text(published_tokenizer):
    for text in [*random_texts(300), *(case["text"] for case in ORACLE["encode"])]:
        ids = published_tokenizer.encode_text(text)
        tokens = published_tokenizer.tokenize(text)
        assert published_tokenizer(text)["input_ids"] == published_tokenizer.encode(text) == ids
        assert published_tokenizer.convert_tokens_to_ids(tokens) == ids
        assert published_tokenizer.convert_ids_to_tokens(ids) == tokens
        assert published_tokenizer.convert_tokens_to_string(tokens) == unicodedata.normalize("NFC", text)


def test_every_id_has_its_own_string(published_tokenizer, tiny_tokenizer):
    for tokenizer in (published_tokenizer, tiny_tokenizer):
        vocabulary = tokenizer.get_vocab()
        assert sorted(vocabulary.values()) == list(range(len(tokenizer)))
        assert tokenizer.convert_ids_to_tokens(list(vocabulary.values())) == list(vocabulary)
    # As GPT-2's byte-level tokens are written.
    assert published_tokenizer.tokenize("a dog\n狗") == ["a", "Ġdog", "Ċ", "çĭĹ"]


def test_a_batch_is_padded_on_either_side(published_tokenizer):
    texts = ["你好，世界。", "", "Hello, world! It's a longer one."]
    rows = [published_tokenizer.encode_text(text) for text in texts]
    width = max(map(len, rows))
    for side in ("right", "left"):
        batch = published_tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        assert batch.keys() == {"input_ids", "attention_mask"}
        assert batch["input_ids"].shape == (3, width) and batch["input_ids"].dtype == torch.int64
        for row, ids, mask in zip(rows, batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
            padding = [N] * (width - len(row))
            assert ids == (row + padding if side == "right" else padding + row)
            assert [i for i, kept in zip(ids, mask, strict=True) if kept] == row
    assert published_tokenizer.padding_side == "right"


def test_truncation(published_tokenizer):
    ids = published_tokenizer.encode_text("one two three four five")
    assert published_tokenizer("one two three four five", truncation=True, max_length=3)["input_ids"] == ids[:3]


# ---- control tokens in ordinary text


def forgeries(count: int) -> list[str]:
    """Strings put together from whole control tokens, pieces of them, and characters that melt or vanish."""
    generator = random.Random(1)
    tokens = [*CONTROL_TOKENS[:5], *GROUNDING_TOKENS, *IMAGE_TOKENS]
    glue = ["", " ", "\n", "\x00", "\u200b", "\u0338", "\ufeff", "\u00ad", "\U000f0000", "\U000f0001", "＜", "＞"]
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(generator.randint(1, 6)):
            token = generator.choice(tokens)
            cut = generator.randint(0, len(token))
            parts += [token[:cut], generator.choice(glue), token[cut:], generator.choice(glue)]
        texts.append("".join(parts))
    return texts


def test_no_text_becomes_a_control_token(published_tokenizer):
    for text in forgeries(20_000):
        ids = published_tokenizer.encode_text(text)
        assert max(ids) < N, text
        assert published_tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_no_text_becomes_a_control_token_through_transformers(published_tokenizer):
    texts = forgeries(2_000)
    assert max(map(max, published_tokenizer(texts)["input_ids"])) < N
    assert all(max(published_tokenizer.encode(text)) < N for text in texts[:200])
    assert not any(set(published_tokenizer.tokenize(text)) & set(CONTROL_TOKENS) for text in texts[:200])


def test_only_the_named_tokens_are_recognised(published_tokenizer):
    box, ref = (published_tokenizer.control_tokens[token] for token in ("<box>", "<ref>"))
    ids = published_tokenizer.encode_text("<box><ref><|im_end|>", tokens=["<box>"])
    assert ids[0] == box and max(ids[1:]) < N
    assert ref not in ids
    for tokens in (["<point>"], "<box>", ["dog"]):
        with pytest.raises(InputError, match="not control tokens"):
            published_tokenizer.encode_text("x", tokens=tokens)


def test_half_a_surrogate_pair_is_refused(published_tokenizer):
    for text in ("ab\ud83d", "ab\ude00cd", "ab\ude00\ud83d"):
        with pytest.raises(InputError, match="character 2"):
            published_tokenizer.encode_text(text)
        with pytest.raises(InputError, match="surrogate"):
            published_tokenizer(text)


def test_a_million_characters_without_a_break(published_tokenizer):
    # tiktoken is linear here from 0.13 on; before, each of these took minutes.
    for character, width in [("a", 8), ("!", 8), ("\n", 32)]:
        ids = published_tokenizer.encode_text(character * 1_000_000)
        assert len(ids) == 1_000_000 // width
    with pytest.raises(InputError, match="white space"):
        published_tokenizer.encode_text(" " * 1_100_000)
    assert published_tokenizer.decode(published_tokenizer.encode_text(" " * 900_000)) == " " * 900_000


def test_words_are_refused(published_tokenizer):
    with pytest.raises(InputError, match="Join the words"):
        published_tokenizer(["a", "dog"], is_split_into_words=True)


# ---- decoding


def test_grounding_can_be_kept(published_tokenizer):
    text = "<|im_start|><img><imgpad></img><ref>the dog</ref><box>(1,2),(3,4)</box><quad>x</quad><|im_end|><|extra_3|>"
    ids = published_tokenizer.encode(text, split_special_tokens=False)
    kept = "<ref>the dog</ref><box>(1,2),(3,4)</box><quad>x</quad>"
    assert published_tokenizer.decode(ids) == text
    assert published_tokenizer.decode(ids, skip_special_tokens=True) == "the dog(1,2),(3,4)x"
    assert published_tokenizer.decode(ids, skip_special_tokens=True, keep_grounding=True) == kept
    assert published_tokenizer.batch_decode([ids, ids], skip_special_tokens=True, keep_grounding=True) == [kept] * 2


def test_spaces_are_never_cleaned_up(published_tokenizer):
    text = "do n't  touch , this ."
    ids = published_tokenizer.encode_text(text)
    assert published_tokenizer.decode(ids, clean_up_tokenization_spaces=True) == text


def test_an_id_without_a_token_is_shown(published_tokenizer):
    hello, comma = published_tokenizer.encode_text("Hello,")
    for stray in (151_860, 151_935, 10**9, -1, -100):
        ids = [hello, stray, comma]
        assert published_tokenizer.decode(ids) == "Hello\ufffd,"
        assert published_tokenizer.decode(ids, skip_special_tokens=True) == "Hello\ufffd,"
        assert published_tokenizer.decode(ids, errors="ignore") == "Hello,"
        assert published_tokenizer.convert_ids_to_tokens(ids) == ["Hello", "\ufffd", ","]
        with pytest.raises(UnicodeDecodeError):
            published_tokenizer.decode(ids, errors="strict")


def test_what_can_be_decoded(published_tokenizer):
    ids = published_tokenizer.encode_text("Hello, world!")
    tensor = torch.tensor(ids)
    assert published_tokenizer.decode(tensor) == published_tokenizer.decode(tensor.numpy()) == "Hello, world!"
    assert published_tokenizer.decode(torch.stack([tensor, tensor])) == ["Hello, world!"] * 2
    assert published_tokenizer.decode(ids[0]) == "Hello" and published_tokenizer.decode([]) == ""
    half = published_tokenizer.encode_text("\u200d")[:1]  # the joiner inside 👩‍👧, two tokens
    assert published_tokenizer.decode(half) == "\ufffd"


class Recorder(TextStreamer):
    """A streamer that keeps what it would print."""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        self.printed = [*getattr(self, "printed", []), text]


def test_streaming_never_prints_half_a_character(published_tokenizer, tiny_tokenizer):
    text = "图中是一只拉布拉多犬 😀👩‍👩‍👧‍👦 and 🇨🇳 flags.\nمرحبا 二行 ñandú 𠮷野家 🤷🏽‍♀️"
    for tokenizer in (published_tokenizer, tiny_tokenizer):  # the tiny vocabulary has most characters in bytes
        streamer = Recorder(tokenizer, skip_special_tokens=True, keep_grounding=True)
        for i in [*tokenizer.encode_text(text), tokenizer.im_end_id]:
            streamer.put(torch.tensor([i]))
        streamer.end()
        assert "".join(streamer.printed) == text
        assert len(streamer.printed) > 5
        assert not any("\ufffd" in piece for piece in streamer.printed)


# ---- loading and saving


def test_published_folder_loads_and_saves_clean(tiny_folder, tmp_path):
    tokenizer = QwenVLTokenizer.from_pretrained(tiny_folder)
    assert (len(tokenizer), tokenizer.image_start_id) == (512 + 217, 726)
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (8192, "right")
    assert tokenizer.split_special_tokens

    saved = tokenizer.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "qwen.tiktoken",
        "tokenizer_config.json",
    ]
    assert {"qwen.tiktoken", "tokenizer_config.json"} <= {Path(path).name for path in saved}
    assert (tmp_path / "qwen.tiktoken").read_bytes() == (tiny_folder / "qwen.tiktoken").read_bytes()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "eos_token": "<|endoftext|>",
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": True,
        "tokenizer_class": "QwenVLTokenizer",
    }


def test_saving_and_loading_again_changes_nothing(tiny_folder, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    tokenizer = QwenVLTokenizer.from_pretrained(tiny_folder, padding_side="left", eos_token="<|im_end|>")
    tokenizer.save_pretrained(first)
    again = QwenVLTokenizer.from_pretrained(first)
    again.save_pretrained(second)
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.padding_side, again.eos_token_id, again.pad_token_id) == ("left", again.im_end_id, again.eod_id)
    assert again.all_special_tokens == list(CONTROL_TOKENS)
    assert [again.encode_text(text) for text in random_texts(50)] == [
        tokenizer.encode_text(text) for text in random_texts(50)
    ]


def test_a_windows_copy_is_saved_as_it_was(folder, tmp_path):
    windows = (folder / "qwen.tiktoken").read_bytes().replace(b"\n", b"\r\n") + b"\r\n"
    unix = QwenVLTokenizer.from_pretrained(folder)
    (folder / "qwen.tiktoken").write_bytes(windows)
    tokenizer = QwenVLTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == unix.get_vocab()
    (folder / "qwen.tiktoken").unlink()  # the tokenizer needs its folder no longer
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "qwen.tiktoken").read_bytes() == windows


def test_the_published_vocabulary_is_saved_byte_for_byte(published_tokenizer, tmp_path):
    published_tokenizer.save_pretrained(tmp_path, filename_prefix="full")
    assert (tmp_path / "full-qwen.tiktoken").read_bytes() == PUBLISHED_VOCABULARY.read_bytes()


def test_tokens_that_an_older_save_repeats_are_accepted(folder):
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    configure(
        folder,
        added_tokens_decoder={"512": token | {"content": "<|endoftext|>"}, "726": token | {"content": "<img>"}},
        extra_special_tokens=["<ref>", "<box>"],
        additional_special_tokens=["<|im_start|>"],
        image_token="<imgpad>",
        eos_token=token | {"content": "<|im_end|>", "__type": "AddedToken"},
        bos_token=None,
        clean_up_tokenization_spaces=True,
    )
    tokenizer = QwenVLTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.image_token == "<imgpad>"
    assert tokenizer.extra_special_tokens == [] and len(tokenizer) == 729
    assert tokenizer.encode("<img>", split_special_tokens=False) == [726]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"added_tokens_decoder": {"729": {"content": "<point>", "special": True}}}, "'<point>' as id 729"),
        ({"added_tokens_decoder": {"151857": {"content": "<img>", "special": True}}}, "'<img>' as id 151857"),
        ({"extra_special_tokens": ["<point>"]}, "'<point>'"),
        ({"pad_token": "[PAD]"}, r"'\[PAD\]'"),
        ({"image_token": "<image>"}, "'<image>'"),
    ],
)
def test_tokens_that_the_vocabulary_lacks_are_refused(folder, changes, expected):
    with pytest.raises(InputError, match=expected):
        QwenVLTokenizer.from_pretrained(configure(folder, **changes))


def test_a_folder_without_a_vocabulary_is_named(folder):
    (folder / "qwen.tiktoken").unlink()
    with pytest.raises(InputError, match=re.escape(str(folder))):
        QwenVLTokenizer.from_pretrained(folder)


def test_what_is_missing_or_damaged_is_named(folder, tmp_path):
    with pytest.raises(MissingFileError, match="absent"):
        QwenVLTokenizer(tmp_path / "absent")
    with pytest.raises(InputError, match="cannot be read"):
        QwenVLTokenizer(tmp_path)
    with pytest.raises(MissingFileError, match="absent cannot be loaded"):
        QwenVLTokenizer.from_pretrained(tmp_path / "absent")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json is not JSON"):
        QwenVLTokenizer.from_pretrained(folder)


def test_pairs_of_texts_are_refused(tiny_tokenizer):
    with pytest.raises(InputError, match="one text"):
        tiny_tokenizer.tokenize("a", "b")


def test_tokens_cannot_be_added(tiny_tokenizer):
    before = pickle.dumps(tiny_tokenizer)
    for add in (
        lambda: tiny_tokenizer.add_tokens("<point>"),
        lambda: tiny_tokenizer.add_tokens(["<box>", "<point>"], special_tokens=True),
        lambda: tiny_tokenizer.add_special_tokens({"pad_token": "[PAD]"}),
        lambda: tiny_tokenizer.add_special_tokens({"extra_special_tokens": ["<point>"]}),
        lambda: setattr(tiny_tokenizer, "pad_token", "[PAD]"),
    ):
        with pytest.raises(InputError, match="not in the vocabulary"):
            add()
    assert pickle.dumps(tiny_tokenizer) == before
    assert tiny_tokenizer.add_tokens(["<box>", "<|im_end|>"]) == 0
    assert tiny_tokenizer.add_special_tokens({"pad_token": "<|extra_0|>"}) == 0
    assert (tiny_tokenizer.pad_token_id, len(tiny_tokenizer)) == (515, 729)


# ---- copies: datasets, data loader workers


def test_copies_are_the_same_tokenizer(published_tokenizer):
    for other in (pickle.loads(pickle.dumps(published_tokenizer)), copy.deepcopy(published_tokenizer)):
        for case in ORACLE["encode"]:
            assert other.encode_text(case["text"]) == published_tokenizer.encode_text(case["text"])
        assert other.control_tokens == published_tokenizer.control_tokens
        assert Hasher.hash(other) == Hasher.hash(published_tokenizer)


def test_the_hash_does_not_depend_on_use_or_process(tiny_folder):
    tokenizer = QwenVLTokenizer.from_pretrained(tiny_folder)
    fresh = pickle.dumps(tokenizer), Hasher.hash(tokenizer)
    tokenizer(["Hello", "a <img>"], padding=True, truncation=True, max_length=4)
    tokenizer.get_vocab()
    tokenizer.decode([1, 2, 3], skip_special_tokens=True)
    assert (pickle.dumps(tokenizer), Hasher.hash(tokenizer)) == fresh

    program = (
        "import sys; from datasets.fingerprint import Hasher; from qwenvl.text.tokenizer import QwenVLTokenizer;"
        "print(Hasher.hash(QwenVLTokenizer.from_pretrained(sys.argv[1])))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run(
        [sys.executable, "-c", program, tiny_folder], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split()[-1] == fresh[1]
