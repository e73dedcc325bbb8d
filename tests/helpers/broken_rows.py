"""Rows that are broken in many ways, by a seed: for the tests and for `reliability/fuzz_data.py`.

Each kind takes a good row of a format and gives the line of a JSON Lines file. What a kind breaks some formats have no
place for, and some damage leaves a good row: what matters is that a row is accepted or reported, and that what is
accepted trains no markup as words and names no image that cannot be opened.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
        {
            "messages": [
                {"role": "user", "content": "<image>Draft, <image>then write."},
                {"role": "assistant", "content": "Draft.", "loss": False},
                {"role": "user", "content": "Again.", "train": False},
                {"role": "assistant", "content": "<quad>(1,2),(30,2),(30,40),(1,40)</quad>", "grounding": True},
            ],
            "images": ["a.png", "pages.pdf#3"],
            "system": "Be short.",
            "note": "not read",
        },
    ],
    "qwen_json": [
        {
            "id": "1",
            "conversations": [
                {"from": "user", "value": "Picture 1: <img>a.png</img>\nFrame it."},
                {"from": "assistant", "value": "<ref>it</ref><box>(1,2),(3,4)</box>"},
            ],
        },
        {
            "conversations": [
                {"from": "user", "value": "<img>pages.tif#2</img> and <img>b.jpg</img>: the sign?"},
                {"from": "assistant", "value": "A draft.", "weight": 0},
                {"from": "user", "value": "Again."},
                {"from": "assistant", "value": "<quad>(1,2),(30,2),(30,40),(1,40)</quad>", "weight": 1},
            ],
            "image": ["pages.tif#2", "b.jpg"],
            "quality": 5,
        },
    ],
    "llava": [
        {
            "image": ["a.png", "b.jpg"],
            "conversations": [
                {"from": "human", "value": "<image>\n<image>\nCompare."},
                {"from": "gpt", "value": "Same."},
            ],
        },
        {
            "images": ["pages.gif#1"],
            "system": "Be short.",
            "conversations": [
                {"from": "human", "value": "See <image>."},
                {"from": "gpt", "value": "What?", "train": False},
                {"from": "human", "value": "It."},
                {"from": "gpt", "value": "Red."},
            ],
        },
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
        {
            "query": "<img>a.png</img>And <ref-object>?",
            "response": "<bbox>",
            "objects": [{"caption": "a cat", "bbox": [[1, 2, 30, 40], [0, 0, 999, 999]], "bbox_type": "norm1000"}],
        },
        {
            "messages": [
                {"role": "user", "content": "<image><image>Where?"},
                {"role": "assistant", "content": "Wait.", "loss": False},
                {"role": "user", "content": "Where?"},
                {"role": "assistant", "content": "<ref-object><bbox> <ref-object><bbox>"},
            ],
            "images": ["a.png", "b.jpg"],
            "objects": {"ref": ["x", "y"], "bbox": [[1, 2, 3, 4], [5, 6, 50, 40]], "image_id": [0, 1]},
        },
    ],
    "texts": [
        {"images": ["a.png"], "texts": [{"user": "What?", "assistant": "A cat."}, {"user": "Why?", "assistant": "x"}]},
        {
            "images": ["b.jpg", "pages.pdf#1"],
            "texts": [
                {"user": "<image> or <image>?", "assistant": "No.", "weight": 0, "source": "made"},
                {"user": "Again.", "assistant": "The first."},
            ],
            "relevance": [3],
        },
    ],
    "vqa": [
        {"image": "a.png", "question": "What?", "answers": ["x", "y", "y"]},
        {"image": "a.png", "question": ["What?", "Why?"], "answers": ["x", ["y", "z"]]},
    ],
    "grounding": [
        {"image": "b.jpg", "phrase": "a dog", "box": [1, 2, 30.5, 40]},
        {"image": "b.jpg", "phrase": ["a dog", {"sent": "dog"}], "box": [1, 2, 3, 4]},
        {"image": "pages.pdf#1", "phrase": "dogs", "boxes": [[1, 2, 30.5, 40], [0, 0, 60, 50]]},
        {"image": "a.png", "phrase": "pigs", "boxes": []},
        {"image": "a.png", "phrase": ["a dog", "a cat"], "boxes": [[[1, 2, 3, 4]], []]},
        {"image": "a.png", "phrase": ["dog", "cat"], "boxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "labels": ["cat", "dog"]},
    ],
    "caption": [{"image": "a.png", "caption": "A dog."}, {"image": "a.png", "caption": ["A dog.", "Dog."]}],
    "fields": [
        {"image": "a.png", "no": "A-17", "total": 12.5, "lines": [{"item": "tea", "price": 2}], "more": '{"a": "b"}'},
        {"image": ["a.png", "pages.tif#1"], "no": "9", "total": None, "lines": [], "more": ""},
    ],
}

SETTINGS: dict[str, dict[str, Any]] = {
    "fields": {"fields": ["no", "total", "lines", "more"], "nested": ["more"]},
}
"""Of a source of a format, besides its path."""

VALUES = [
    *(None, True, False, 0, -1, 3.5, 10**30, float("nan"), float("inf")),
    *("", " ", "x", "text\0", "\ud800", "user", "assistant", "system", "human", "image", "text", "video"),
    *("gone.png", "../x.png", "/etc/passwd", "/dev/zero", "file:///etc/passwd", "http://127.0.0.1/", "fifo", "."),
    *("data:image/png;base64,AAAA", "x" * 9000, "<img>", "</img><img>", "<image>", "<box>(1,2),(3,4000)</box>"),
    *("<|im_end|>\n<|im_start|>system\n", "<ref>", "ﷺ" * 50, "e\u0301", "\u202e"),
    *([], {}, [None], [[]], {"a": None}, ["x"], [1, 2, 3, 4], [3, 3, 1, 1], {"bytes": "x"}, {"path": "a.png"}),
    *({"bytes": None, "path": None}, {"role": "user", "content": "x"}, {"type": "image"}, {"url": "a.png"}),
    *("a.png#1", "a.png#2", "pages.pdf", "pages.pdf#9", [0, 0, 61, 51], [-3, 0, 900, 50], [[1, 2, 3, 4], [1, 2]]),
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
    *(
        "boxes",
        "labels",
        "phrase",
        "bbox_type",
        "image_id",
        "ref",
        "bbox",
        "system",
        "weights",
        "videos",
        "loss_scale",
    ),
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


NAMES = ("a.png", "b.jpg", "pages.pdf#1", "pages.pdf#3", "pages.tif#1", "pages.tif#2", "pages.gif#1")
"""The images of good rows."""
MARKS = ("loss", "train", "training", "trainable", "loss_scale", "weight")
"""Keys of turns that say whether they are trained."""


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
    for name in NAMES:
        text = text.replace(json.dumps(name)[1:-1], json.dumps(path)[1:-1])
    return json.loads(text)


def turns(row: Row, change: Callable[[list], Any]) -> Row:
    """The row with its list of turns, if it has one, changed."""
    for name in ("messages", "conversations", "texts"):
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


LOOK_ALIKES = [
    *("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<img>", "</img>", "<imgpad>", "<|extra_0|>", "<image>", "<IMG>"),
    *('<img src="a.png">', "<|vision_start|>", "<bbox>", "[IMG]", "< image >", "<image_1>", "</image>", "<image/>"),
    *("<ref-object>", "<video>", "<loc0123>", "[INST]", "<|image_pad|>", "<|IM_END|>", "Picture 1: a.png"),
    *("data:image/png;base64,AAAA", "<im_patch>", "<cls-object>", "<img src='a.png' />", "<grounding>"),
]
"""Text that looks like a token or like markup, whatever the format."""
BOXES = ["<box>(1,2),(3,4)</box>", "<ref>a</ref>", "<quad>(1,2),(3,4),(5,6),(7,8)</quad>", "<box>(1,2),(3,1000)</box>"]
"""Markup that grounding texts may hold."""
SEEN = [*LOOK_ALIKES, *BOXES, "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"]
"""What no accepted row may train as words without its being counted."""

TEXTS = {
    "control_tokens": ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<img>", "</img>", "<imgpad>", "<|extra_0|>"],
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
    "look_alikes": LOOK_ALIKES,
    "boxes_in_texts": BOXES,
}
"""Kind -> what is put into a text."""

IMAGES = {
    "images_that_are_gone": ["gone.png", "a.png.gone", "A.PNG", "D:\\scans\\a.png", "gone%20.png", "sub\\gone.png"],
    "images_outside": ["../outside.png", "/etc/passwd", "sub/../../outside.png", "~/a.png"],
    "images_outside_of_other_systems": ["%2e%2e/outside.png", "..\\outside.png", "sub%5C..%5C..%5Coutside.png"],
    "linked_images_outside": ["link_outside.png"],
    "looping_links": ["loop.png"],
    "device_images": ["/dev/zero", "/dev/random", "/proc/self/mem", "/proc/kmsg"],
    "pipe_images": ["fifo"],
    "folder_images": [".", "sub", "sub/"],
    "empty_images": ["empty.png"],
    "url_images": ["http://127.0.0.1/a.png", "https://169.254.169.254/latest/meta-data", "HTTP://[::1]/a.png"],
    "other_url_images": ["file:///etc/passwd", "ftp://host/a.png", "s3://bucket/a.png", "//host/share/a.png"],
    "pages_that_are_not_there": ["a.png#0", "pages.pdf#4", "pages.tif#4", "pages.gif#00", "gone.pdf#1", "pages.pdf#x"],
    "pages_outside": ["../outside.png#1", "%2e%2e/outside.png#1", "pages.pdf#1/../../outside.png"],
    "pages_not_named": ["pages.pdf", "pages.tif", "pages.gif", "pages%2Epdf", "./pages.pdf", "pages.pdf%23"],
    "pages_that_cannot_be_read": ["locked.pdf#1", "locked.pdf", "cut.pdf#1", "cut.pdf", "both.pdf#1"],
    "impossible_paths": ["a\0.png", "x" * 5000, "\ud800.png", "a.png#" + "9" * 5000],
}
"""Kind -> what stands in place of a row's images; all must be reported."""

OTHER_NAMES = [
    *("a%2Epng", ".\\a.png", "./a.png", "file://FOLDER/a.png", "sub\\..\\a.png", "a.png#1", "pages.pdf#3"),
    *(
        "pages%2Epdf#2",
        "pages.pdf%232",
        "hash#1.png",
        "100%.png",
        "a.png#2",
        "both.tif#1",
        "pages.webp",
        "pages.webp#2",
    ),
    *(
        "PAGES.PDF#1",
        "pages.pdf#03",
        "pages.webp",
        "pages.webp#2",
        "FOLDER/a.png",
        "file:FOLDER/a.png",
        "File://localhostFOLDER/b.jpg",
    ),
]
"""Paths of images that are read as they stand, or reported: none as another file. FOLDER is the data's folder."""

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
            lambda given: [{**t, draw.choice(MARKS): draw.choice([*VALUES[:9], 0, 1, False])} for t in given],
        )
    ),
    "doubled_turns": lambda draw, row: dumped(turns(row, lambda given: [turn for turn in given for _ in "12"])),
    "reversed_turns": lambda draw, row: dumped(turns(row, lambda given: given[::-1])),
    "unknown_roles": lambda draw, row: dumped(
        turns(row, lambda given: [{**t, "role": "tool", "from": 3} for t in given])
    ),
    "image_columns": lambda draw, row: dumped(
        {
            **row,
            draw.choice(["image", "images", "image_path", "img", "pixel_values"]): draw.choice(["a.png", ["a.png"]]),
        }
    ),
    "images_named_otherwise": lambda draw, row: dumped(with_images(row, draw.choice(OTHER_NAMES))),
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


def broken_lines(row_format: str, count: int, seed: int, folder: Path) -> Iterator[tuple[str, bool, bytes]]:
    """(kind, whether it must be reported, line) of so many rows; each kind as often as any other."""
    draw = random.Random(f"{seed} {row_format}")
    kinds = list(KINDS)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        row = draw.choice(GOOD[row_format])
        has_image = any(name in json.dumps(row) for name in NAMES)
        must = kind in MUST_BE_REPORTED or (kind in IMAGES and has_image)
        line = KINDS[kind](draw, row).replace(b"FOLDER", str(folder).encode())
        # Rows are lines.
        yield kind, must, line.replace(b"\n", b" ") or b"?"
