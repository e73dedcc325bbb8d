"""The published list format: its text form as the published tokenizer wrote it, and entries that are none."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenvl import InputError
from qwenvl.text.chat import render_prompt
from qwenvl.text.list_format import Query, from_list_format

PUBLISHED = json.loads((Path(__file__).parents[2] / "data" / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", PUBLISHED["from_list_format"], ids=["image", "box"])
def test_printed_it_is_the_published_string(case):
    query = from_list_format(case["list"])
    assert str(query) == f"{query}" == case["text"]
    assert query.images == [entry["image"] for entry in case["list"] if "image" in entry]


def test_it_is_no_string_that_could_lose_its_images():
    query = from_list_format([{"image": "a.png"}, {"text": "What is it?"}])
    assert not isinstance(query, str) and isinstance(query, Query)
    with pytest.raises(TypeError):
        query + " Answer:"
    with pytest.raises(TypeError, match="not JSON serializable"):
        json.dumps([(query, "a dog")])


def test_names_of_images_in_print(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    images = [
        tmp_path / "a.png",
        Image.open(tmp_path / "a.png"),
        Image.new("RGB", (4, 4)),
        {"bytes": b"...", "path": "b.jpg"},
        "data:image/png;base64,AAAA",
        np.zeros((2, 2), np.uint8),
    ]
    printed = str(from_list_format([{"image": image} for image in images]))
    names = [str(tmp_path / "a.png")] * 2 + ["Image", "b.jpg", "data URI", "ndarray"]
    assert printed == "".join(f"Picture {number}:<img>{name}</img>\n" for number, name in enumerate(names, start=1))


@pytest.mark.parametrize(
    "entries",
    [
        [{"image": "a.png"}, {"text": "Where is "}, {"ref": "the cat", "box": [[1, 2, 300, 400], [0, 0, 999, 999]]}],
        [{"text": "Is this <|im_end|> or <img>b.png</img> or \U000f0000<box>\U000f0001?"}],
        [{"image": "a.png"}, {"text": "<ref>the cat</ref><box>"}],
    ],
)
def test_as_a_raw_prompt_of_the_processor(tiny_processor, entries):
    query = from_list_format(entries)
    wanted = render_prompt(query.parts, tiny_processor.tokenizer, grounding=True, numbered=True)
    pixels = [Image.new("RGB", (4, 4)) for _ in query.images]
    assert tiny_processor(text=query.text, images=pixels)["input_ids"] == [wanted.ids]


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ("a.png", "takes a list of entries, not str"),
        ({"image": "a.png"}, "takes a list of entries, not dict"),
        ([], "an empty list"),
        (["What is it?"], r"entry 0 of the list must be \{'image': source\}, .* not What is it\?"),
        ([{"text": "a"}, {"image": "a.png", "text": "b"}], "entry 1 of the list must be"),
        ([{"image": None}], "entry 0 of the list must be"),
        ([{"text": 3}], "entry 0 of the list must be"),
        ([{"ref": "the cat"}], "entry 0 of the list must be"),
        ([{"box": [1, 2, 300, 400]}], r"entry 0 of the list: box must be a list of boxes .* not \[1, 2, 300, 400\]"),
        ([{"box": [[1, 2, 300, 1000]]}], r"whole thousandths of the image \(0..999\)"),
        ([{"box": [[0.1, 0.2, 0.3, 0.4]]}], "whole thousandths"),
        ([{"box": []}], "box must be a list of boxes"),
        ([{"ref": "<box>", "box": [[1, 2, 3, 4]]}], "entry 0 of the list: the label '<box>' holds '<box>'"),
        ([{"ref": 7, "box": [[1, 2, 3, 4]]}], "entry 0 of the list: ref must be a phrase, not int"),
    ],
)
def test_other_entries_are_named(entries, reason):
    with pytest.raises(InputError, match=reason):
        from_list_format(entries)
