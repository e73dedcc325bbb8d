"""20,000 damaged rows: each is accepted or reported with file, row, field and reason, and none ends in a traceback."""

import json
import os
import random
from types import SimpleNamespace

import pytest
from PIL import Image

from finetune.data.checking import check_samples
from finetune.data.sample import BadRow
from finetune.data.samples import Samples
from qwenvl.chat import render_chat

ROWS = {"messages": 6000, "qwen_json": 4000, "llava": 4000, "vqa": 2500, "grounding": 2000, "caption": 1500}

GOOD = {
    "messages": [
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A cat."}], "grounding": True},
            ],
            "images": ["a.png"],
        },
        {"prompt": "Hi", "completion": [{"role": "assistant", "content": "Hello"}], "images": None},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]},
                {"role": "assistant", "content": "<ref>x</ref><box>(1,2),(3,4)</box>", "grounding": True},
            ]
        },
    ],
    "qwen_json": [
        {
            "id": "1",
            "conversations": [
                {"from": "user", "value": "Picture 1: <img>a.png</img>\nFrame it."},
                {"from": "assistant", "value": "<ref>it</ref><box>(1,2),(3,4)</box>"},
            ],
        }
    ],
    "llava": [
        {
            "image": ["a.png", "b.jpg"],
            "conversations": [
                {"from": "human", "value": "<image>\n<image>\nCompare."},
                {"from": "gpt", "value": "Same."},
            ],
        }
    ],
    "vqa": [
        {"image": "a.png", "question": "What?", "answers": ["x", "y", "y"]},
        {"image": "a.png", "question": ["What?", "Why?"], "answers": ["x", ["y", "z"]]},
    ],
    "grounding": [
        {"image": "b.jpg", "phrase": "a dog", "box": [1, 2, 30.5, 40]},
        {"image": "b.jpg", "phrase": ["a dog", {"sent": "dog"}], "box": [1, 2, 3, 4]},
    ],
    "caption": [{"image": "a.png", "caption": "A dog."}, {"image": "a.png", "caption": ["A dog.", "Dog."]}],
}

VALUES = [
    *(None, True, False, 0, -1, 3.5, 10**30, float("nan"), float("inf")),
    *("", " ", "x", "text\0", "\ud800", "user", "assistant", "system", "human", "image", "text", "video"),
    *("gone.png", "../x.png", "/etc/passwd", "/dev/zero", "file:///etc/passwd", "http://127.0.0.1/", "fifo", "."),
    *("data:image/png;base64,AAAA", "x" * 9000, "<img>", "</img><img>", "<image>", "<box>(1,2),(3,4000)</box>"),
    *("<|im_end|>\n<|im_start|>system\n", "<ref>", "ﷺ" * 50, "e\u0301", "\u202e"),
    *([], {}, [None], [[]], {"a": None}, ["x"], [1, 2, 3, 4], [3, 3, 1, 1], {"bytes": "x"}, {"path": "a.png"}),
    *({"bytes": None, "path": None}, {"role": "user", "content": "x"}, {"type": "image"}, {"url": "a.png"}),
]
KEYS = ["role", "content", "type", "text", "image", "images", "from", "value", "grounding", "weight", "path", "index"]


def damage(draw, value):
    """The value with one thing in it changed, taken out, doubled or put in."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        change = draw.random()
        if change < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if change < 0.2:
            return {**value, draw.choice(KEYS): draw.choice(VALUES)}
        return {**value, key: damage(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.85:
        place = draw.randrange(len(value))
        change = draw.random()
        if change < 0.1:
            return value[:place] + value[place + 1 :]
        if change < 0.2:
            return value[:place] + [value[place]] + value[place:]
        if change < 0.25:
            return value[::-1]
        return [*value[:place], damage(draw, value[place]), *value[place + 1 :]]
    if isinstance(value, str) and draw.random() < 0.4:
        place = draw.randint(0, len(value))
        return value[:place] + str(draw.choice(VALUES)) + value[place:]
    return draw.choice(VALUES)


def line(draw, row):
    """A row as a line of bytes, which now and then is itself damaged."""
    data = bytearray(json.dumps(row, ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass"))
    if draw.random() < 0.05:
        data[draw.randrange(len(data))] = draw.choice([c for c in range(256) if c not in b"\n"])
    if draw.random() < 0.02:
        del data[draw.randrange(len(data)) :]
    if draw.random() < 0.02:
        data = bytearray(draw.choice([b"null", b"[]", b'"x"', b"[" * 5000, b"{}", b"9" * 5000, b"\xff\xfe"]))
    return bytes(data) or b"{"


@pytest.mark.parametrize("row_format", ROWS)
def test_accepted_and_reported_are_all(tmp_path, tiny_processor, tiny_images, row_format):
    (tmp_path / "a.png").write_bytes(tiny_images[0].read_bytes())
    Image.open(tiny_images[0]).convert("RGB").save(tmp_path / "b.jpg")
    os.mkfifo(tmp_path / "fifo")
    draw = random.Random(row_format)
    lines = []
    for _ in range(ROWS[row_format]):
        row = draw.choice(GOOD[row_format])
        for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
            row = damage(draw, row)
        lines.append(line(draw, row))
    (tmp_path / "fuzz.jsonl").write_bytes(b"\n".join(lines) + b"\n")

    settings = {"config": None, "split": None, "columns": {}, "prompt": None, "box_form": None}
    path = str(tmp_path / "fuzz.jsonl")
    source = SimpleNamespace(path=path, format=row_format, weight=1.0, limit=None, **settings)
    samples = Samples([source])
    tokenizer = tiny_processor.tokenizer
    rules = {"n_queries": 4, "max_length": 1000, "on_long": "drop", "on_bad_row": "skip", "show_progress": False}
    found = check_samples(samples, tokenizer, **rules)

    assert len(found.kept) + found.refused + len(found.dropped_long) == len(samples)
    accepted = {samples[index].origin.row for index in found.kept.tolist()}
    reported = {problem.origin.row for problem in found.problems}
    too_long = {long.origin.row for long in found.dropped_long}
    assert accepted | reported | too_long == set(range(1, ROWS[row_format] + 1))
    if found.total == ROWS[row_format]:  # where each row is one sample, it has one fate
        assert len(accepted) + len(reported) + len(too_long) == ROWS[row_format]

    # Both happen in numbers, or this would show nothing.
    assert min(len(accepted), len(reported)) > ROWS[row_format] / 10
    for problem in found.problems:
        assert isinstance(problem, BadRow)
        assert problem.origin.file == path
        assert problem.field
        assert problem.reason
        assert len(str(problem)) < 1500
    for index, length in zip(found.kept.tolist(), found.lengths.tolist(), strict=True):
        assert len(render_chat(samples[index].messages, tokenizer, n_queries=4).ids) == length
