"""Rows that are broken in many ways, by a seed: for the tests and for `reliability/fuzz_data.py`.

Each kind takes a good row of a format and gives the line of a JSON Lines file. What a kind breaks some formats have no
place for, and some damage leaves a good row: what matters is that a row is accepted or reported.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from finetune.data.checking import check_samples
from finetune.data.sample import BadRow
from finetune.data.samples import Samples
from qwenvl import QwenVLTokenizer

Row = dict[str, Any]

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
    "swift": [
        {
            "query": "<image>What?",
            "response": "A cat.",
            "history": [["Hi <image>", "Hello"]],
            "system": "Be short.",
            "images": ["a.png", "b.jpg"],
        },
        {
            "query": "<image>Where is <ref-object>?",
            "response": "<bbox>",
            "images": ["b.jpg"],
            "objects": {"ref": ["a dog"], "bbox": [[1, 2, 30.5, 40]], "bbox_type": "real"},
        },
    ],
    "texts": [
        {"images": ["a.png"], "texts": [{"user": "What?", "assistant": "A cat."}, {"user": "Why?", "assistant": "x"}]}
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
KEYS = [
    "loss",
    "train",
    "tools",
    "history",
    "objects",
    "role",
    "content",
    "type",
    "text",
    "image",
    "images",
    "from",
    "value",
    "grounding",
    "weight",
    "path",
    "index",
]


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


def anywhere(draw: random.Random, value: Any, change: Callable[[str], Any]) -> Any:
    """The value with one of the texts in it changed; itself where it has none."""
    texts = list(_texts(value))
    return _at(value, draw.choice(texts), change) if texts else value


def _texts(value: Any, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(value, str):
        yield path
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from _texts(inner, (*path, key))


def _at(value: Any, path: tuple, change: Callable[[str], Any]) -> Any:
    if not path:
        return change(value)
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = _at(copied[path[0]], path[1:], change)
    return copied


def with_images(row: Row, path: str) -> Row:
    """The row with all its images being this one."""
    text = json.dumps(row)
    for name in ("a.png", "b.jpg"):
        text = text.replace(json.dumps(name)[1:-1], json.dumps(path)[1:-1])
    return json.loads(text)


def turns(row: Row, change: Callable[[list], Any]) -> Row:
    """The row with its list of turns, if it has one, changed."""
    for name in ("messages", "conversations"):
        if isinstance(row.get(name), list):
            return {**row, name: change(row[name])}
    return row


def dumped(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass")


def put_in(draw: random.Random, row: Row, text: str) -> Row:
    """The row with a text put into one of its texts."""

    def change(old):
        place = draw.randint(0, len(old))
        return old[:place] + text + old[place:]

    return anywhere(draw, row, change)


def cut(draw, row):
    data = dumped(row)
    return data[: draw.randrange(1, len(data))]


def flipped(draw, row):
    data = bytearray(dumped(row))
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data).replace(b"\n", b"?") or b"?"


def no_utf8(draw, row):
    data = bytearray(dumped(row))
    data[draw.randrange(1, len(data) - 1)] = draw.choice([0x80, 0xC0, 0xF5, 0xFF])
    return bytes(data)


def twice(draw, row, name):
    return b"{" + dumped({name: draw.choice(VALUES[:9])})[1:-1] + b"," + dumped(row)[1:]


TEXTS = {
    "control_tokens": ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<img>", "</img>", "<imgpad>", "<|extra_0|>"],
    "markup_of_others": [
        "<image>",
        "<IMG>",
        '<img src="a.png">',
        "<|vision_start|>",
        "<bbox>",
        "[IMG]",
        "<box>(1,2),(3,4)</box>",
    ],
    "malformed_markup": [
        "<box>(1,2),(3,4000)</box>",
        "<box>",
        "</ref>",
        "<quad>(1,2)</quad>",
        "<box>(5,5),(1,1)</box>",
    ],
    "half_surrogates": ["\ud800", "\udfff", "x\udc00y"],
    "odd_characters": ["\0", "\u202e", "\u2028", "e\u0301", "ﷺ" * 30, "\ufeff", "\x1b[31m", "\r"],
    "very_long_texts": ["word " * 3000, "x" * 20_000, "\n" * 9000],
}
"""Kind -> what is put into a text."""

IMAGES = {
    "images_that_are_gone": ["gone.png", "a.png.gone", "A.PNG"],
    "images_outside": ["../outside.png", "/etc/passwd", "sub/../../outside.png", "~/a.png"],
    "linked_images_outside": ["link_outside.png"],
    "looping_links": ["loop.png"],
    "device_images": ["/dev/zero", "/dev/random", "/proc/self/mem", "/proc/kmsg"],
    "pipe_images": ["fifo"],
    "folder_images": [".", "sub", "sub/"],
    "empty_images": ["empty.png"],
    "url_images": ["http://127.0.0.1/a.png", "https://169.254.169.254/latest/meta-data", "HTTP://[::1]/a.png"],
    "other_url_images": ["file:///etc/passwd", "ftp://host/a.png", "s3://bucket/a.png", "//host/share/a.png"],
    "impossible_paths": ["a\0.png", "x" * 5000, "\ud800.png"],
}
"""Kind -> what stands in place of a row's images; all must be reported."""

KINDS: dict[str, Callable[[random.Random, Row], bytes]] = {
    # The line.
    "cut_lines": cut,
    "flipped_bits": flipped,
    "no_utf8": no_utf8,
    "no_objects": lambda draw, row: draw.choice([b"null", b"[]", b'"x"', b"3.5", b"true", b"NaN", b"[{}]"]),
    "empty_objects": lambda draw, row: b"{}",
    "deep_nesting": lambda draw, row: b'{"a":' * draw.choice([500, 5000, 50_000]) + b"1",
    "huge_numbers": lambda draw, row: b'{"a": ' + b"9" * draw.choice([5000, 20_000]) + b"}",
    "two_objects_a_line": lambda draw, row: dumped(row) + b" " + dumped(row),
    "trailing_commas": lambda draw, row: dumped(row)[:-1] + b",}",
    "single_quotes": lambda draw, row: repr(row).encode(errors="replace"),
    "repeated_keys": lambda draw, row: twice(draw, row, draw.choice(list(row))),
    # The columns.
    "missing_columns": lambda draw, row: dumped(dict(draw.sample(list(row.items()), len(row) - 1))),
    "null_columns": lambda draw, row: dumped({**row, draw.choice(list(row)): None}),
    "wrong_types": lambda draw, row: dumped({**row, draw.choice(list(row)): draw.choice([0, True, 3.5, {"a": 1}])}),
    "renamed_columns": lambda draw, row: dumped({f"{k}_": v for k, v in row.items()}),
    "more_columns": lambda draw, row: dumped({**row, draw.choice(KEYS): draw.choice(VALUES)}),
    "blank_texts": lambda draw, row: dumped(anywhere(draw, row, lambda text: draw.choice(["", " ", "\n\t"]))),
    "empty_lists": lambda draw, row: dumped({k: [] if isinstance(v, list) else v for k, v in row.items()}),
    # The conversation.
    "no_replies": lambda draw, row: dumped(turns(row, lambda given: given[:-1])),
    "marked_turns": lambda draw, row: dumped(
        turns(
            row,
            lambda given: [{**t, draw.choice(["loss", "train", "weight"]): draw.choice(VALUES[:9])} for t in given],
        )
    ),
    "doubled_turns": lambda draw, row: dumped(turns(row, lambda given: [turn for turn in given for _ in "12"])),
    "reversed_turns": lambda draw, row: dumped(turns(row, lambda given: given[::-1])),
    "unknown_roles": lambda draw, row: dumped(
        turns(row, lambda given: [{**t, "role": "tool", "from": 3} for t in given])
    ),
    "one_image_more": lambda draw, row: dumped(
        {**row, "images": ["a.png", "a.png"], "image": ["a.png", "a.png", "a.png"]}
    ),
    "damaged_values": lambda draw, row: dumped(damage(draw, damage(draw, row))),
    **{
        kind: lambda draw, row, given=given: dumped(put_in(draw, row, draw.choice(given)))
        for kind, given in TEXTS.items()
    },
    **{
        kind: lambda draw, row, given=given: dumped(with_images(row, draw.choice(given)))
        for kind, given in IMAGES.items()
    },
}
"""What is wrong -> the line of such a row."""

MUST_BE_REPORTED = {
    *("no_objects", "empty_objects", "deep_nesting", "huge_numbers", "two_objects_a_line", "trailing_commas"),
    *("cut_lines", "no_utf8", "single_quotes", "renamed_columns"),
}
"""Kinds of which no row may be accepted, besides those of `IMAGES` where the row has an image."""


def broken_lines(row_format: str, count: int, seed: int) -> Iterator[tuple[str, bool, bytes]]:
    """(kind, whether it must be reported, line) of so many rows; each kind as often as any other."""
    draw = random.Random(f"{seed} {row_format}")
    kinds = list(KINDS)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        row = draw.choice(GOOD[row_format])
        has_image = "a.png" in json.dumps(row) or "b.jpg" in json.dumps(row)
        must = kind in MUST_BE_REPORTED or (kind in IMAGES and has_image)
        # Rows are lines.
        yield kind, must, KINDS[kind](draw, row).replace(b"\n", b" ") or b"?"


def write_images(folder: Path) -> None:
    """The images that the rows name, and what else their paths may lead to."""
    Image.new("RGB", (60, 50), "teal").save(folder / "a.png")
    Image.new("RGB", (60, 50), "teal").save(folder / "b.jpg")
    Image.new("RGB", (60, 50), "red").save(folder.parent / "outside.png")
    (folder / "sub").mkdir()
    (folder / "empty.png").touch()
    (folder / "link_outside.png").symlink_to(folder.parent / "outside.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "fifo")


def check_broken_rows(
    folder: Path, row_format: str, count: int, seed: int, tokenizer: QwenVLTokenizer
) -> Counter[tuple[str, str]]:
    """Rows by kind and fate (accepted, reported, too_long), each with exactly one.

    Raises:
        AssertionError: a row is lost, counted twice, accepted though it must not be, or reported without its place.
    """
    folder = folder / row_format
    folder.mkdir()
    write_images(folder)
    lines = list(broken_lines(row_format, count, seed))
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(line for _, _, line in lines) + b"\n")
    settings = {
        "config": None,
        "split": None,
        "columns": {},
        "prompt": None,
        "box_form": None,
        "streaming": False,
        "encoding": None,
        "delimiter": None,
        "part": None,
    }
    samples = Samples([SimpleNamespace(path=str(path), format=row_format, weight=1.0, limit=None, **settings)])
    rules = {"n_queries": 4, "max_length": 1000, "on_long": "drop", "on_bad_row": "skip", "show_progress": False}
    found = check_samples(samples, tokenizer, **rules)

    assert len(found.kept) + found.refused + len(found.dropped_long) == len(samples)
    fates = {"accepted": {samples[index].origin.row for index in found.kept.tolist()}}
    fates["reported"] = {problem.origin.row for problem in found.problems}
    fates["too_long"] = {long.origin.row for long in found.dropped_long} - fates["accepted"]
    assert fates["accepted"] | fates["reported"] | fates["too_long"] == set(range(1, count + 1))
    if row_format in ("vqa", "caption", "grounding"):
        # Of a row that makes several samples, one may hold what is refused.
        fates = {fate: rows - fates["reported"] if fate != "reported" else rows for fate, rows in fates.items()}
    assert not fates["reported"] & (fates["accepted"] | fates["too_long"])
    for problem in found.problems:
        assert isinstance(problem, BadRow)
        assert problem.origin.file == str(path)
        assert problem.field and problem.reason and len(str(problem)) < 1500, problem
    counts = Counter()
    for fate, rows in fates.items():
        for row in rows:
            kind, must_be_reported, line = lines[row - 1]
            assert fate == "reported" or not must_be_reported, (kind, fate, line[:300])
            counts[kind, fate] += 1
    return counts
