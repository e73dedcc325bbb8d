"""`tokenizer.json` gives the ids that `qwen.tiktoken` gives, on the published vocabulary."""

import json
import random
import unicodedata

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.export.qwen2_tokenizer import write_tokenizer
from qwenvl.text.vocabulary import CONTROL_TOKENS, IM_END, Vocabulary

# Runs of code points of many scripts and kinds; others come from the whole of Unicode. Left out are the combining
# marks from U+10F82, of Unicode 14: `tokenizers` has older tables, and leaves them in the order that they are in.
RANGES = (
    *((0x20, 0x7F), (0x30, 0x3A), (0xA0, 0x180), (0x300, 0x370), (0x370, 0x400), (0x400, 0x500), (0x590, 0x700)),
    *((0x900, 0x980), (0xE00, 0xE80), (0x1E00, 0x2070), (0x2190, 0x2600), (0x3040, 0x3100), (0x4E00, 0x9FFF)),
    *((0xAC00, 0xD7A4), (0xF900, 0xFB00), (0xFE00, 0xFFFE), (0x1F300, 0x1FA00), (0x10000, 0x10F00), (0x80, 0xA0)),
)
WORDS = (
    *("the", " The", " I'll", "WE'VE", " can't", "'s", " it'S", "don\u2019t", " 3.14159", " 2,048", "1234567890"),
    *(
        " naïve",
        "café",
        "cafe\u0301",
        " 图片",
        "你好，世界！",
        "東京",
        "서울",
        " Привет",
        "مرحبا",
        "नमस्ते",
        "สวัสดี",
        "שלום",
    ),
    *(
        "\n",
        "\n\n",
        "\r\n",
        " \n ",
        "\t",
        "   ",
        "          ",
        "\u00a0",
        "\u3000",
        " \u200b",
        "\u2028",
        "\x0b",
        "\x85",
    ),
    *(
        "👩‍💻",
        "🇩🇪",
        "❤️",
        "def f(x):",
        "    return",
        " ==",
        "!=",
        "->",
        "://",
        "</div>",
        "{}",
        "...",
        "\\n",
        "<ref",
        "|>",
    ),
)


def strings(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        pieces = []
        for _ in range(rng.randrange(1, 12)):
            kind = rng.random()
            if kind < 0.6:
                pieces.append(rng.choice(WORDS))
            elif kind < 0.9:
                low, high = rng.choice(RANGES)
                pieces += [chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 8))]
            else:
                pieces += [chr(code) for code in rng.choices(range(0x110000), k=3) if not 0xD800 <= code < 0xE000]
        made.append("".join(pieces))
    return made


@pytest.fixture(scope="module")
def vocabulary(published_tokenizer) -> Vocabulary:
    return published_tokenizer._vocabulary


@pytest.fixture(scope="module")
def folder(vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(vocabulary, folder, eos_token=IM_END, max_length=2048)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return folder


@pytest.fixture(scope="module", params=[AutoTokenizer, PreTrainedTokenizerFast], ids=["auto", "as it is"])
def theirs(folder, request):
    """As Transformers 5 builds it for Qwen2, and as others read the file."""
    return request.param.from_pretrained(folder)


def same(ours, theirs, texts):
    # Two pieces side by side may spell a control token, which a tokenizer.json reads as one.
    expected = [ours.encode_text(text, tokens=CONTROL_TOKENS) for text in texts]
    wrong = [text for text, ids in zip(texts, expected, strict=True) if theirs.encode(text) != ids]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ: {wrong[:3]!r}"
    for text, ids in zip(texts, expected, strict=True):
        assert theirs.decode(ids) == ours.decode(ids) == unicodedata.normalize("NFC", text)


def test_two_thousand_strings_tokenise_alike(published_tokenizer, theirs):
    same(published_tokenizer, theirs, strings(2_000, seed=1))


@pytest.mark.slow
def test_ten_thousand_strings_tokenise_alike(published_tokenizer, theirs):
    same(published_tokenizer, theirs, strings(10_000, seed=2))


def test_control_tokens_have_their_ids(published_tokenizer, theirs):
    for token, token_id in published_tokenizer.control_tokens.items():
        assert theirs.convert_tokens_to_ids(token) == token_id
    assert published_tokenizer.control_tokens["<|endoftext|>"] == 151643
    text = "<|im_start|>user\nfind <ref>the dog</ref><|im_end|>\n<img><imgpad></img>"
    assert theirs.encode(text) == published_tokenizer.encode_text(text, tokens=CONTROL_TOKENS)
    assert theirs.decode(theirs.encode(text)) == text
    assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == "user\nfind the dog\n"
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (151645, 151643, None)
    assert len(theirs) == 151860


def test_the_chat_template_writes_what_chat_writes(published_tokenizer, theirs):
    messages = [
        {"role": "user", "content": "Hello, what's  2 + 2?\n"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": [{"type": "text", "text": "图中"}, {"type": "text", "text": "有什么?"}]},
    ]
    for conversation in (messages, [{"role": "system", "content": "Be short."}, *messages]):
        expected = published_tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
        got = theirs.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert got == expected
    with pytest.raises(Exception, match="an image goes in by prompt_embeddings"):
        theirs.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])


def test_every_token_is_merged_from_one_pair(vocabulary, folder):
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    merged = [left + right for left, right in merges]
    strings = vocabulary.token_strings[: vocabulary.ordinary_size]
    assert merged == [string for string in strings if len(string) > 1]
