"""Grounding markup: exact strings, exact round trips, and no string that breaks the reader."""

import ast
import itertools
import random
import time
from pathlib import Path

import numpy as np
import pytest

from qwenvl import grounding
from qwenvl.grounding import (
    BOX_OPEN,
    GROUNDING_TAGS,
    Box,
    Region,
    box_markup,
    grounding_prompt,
    parse_grounding,
    quad_markup,
    shapes_markup,
    split_markup,
    strip_markup,
)


def join(pieces):
    return "".join(piece for piece, _ in pieces)


def tags(pieces):
    return [piece for piece, is_tag in pieces if is_tag]


def coordinates(markup):
    return [region.points for region in parse_grounding(markup).regions]


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "size", "form", "expected"),
    [
        ([64, 48, 320, 240], (640, 480), "xyxy", "<box>(100,100),(500,500)</box>"),
        ([64, 48, 256, 192], (640, 480), "xywh", "<box>(100,100),(500,500)</box>"),
        ([0, 0, 640, 480], (640, 480), "xyxy", "<box>(0,0),(999,999)</box>"),  # the whole image
        ([-20.5, -1, 700, 10_000], (640, 480), "xyxy", "<box>(0,0),(999,999)</box>"),  # partly outside: cut off
        ([10.9, 20.9, 10.9, 20.9], (100, 100), "xyxy", "<box>(109,209),(109,209)</box>"),  # no area, floor
        ([20.9, 0.57, 58.3, 1], (100, 1), "xyxy", "<box>(209,570),(583,999)</box>"),  # decimals, not the doubles below
        ([29, 57, 58, 58], (100, 100), "xyxy", "<box>(290,570),(580,580)</box>"),
        ([1, 1, 2, 2], (3, 3), "xyxy", "<box>(333,333),(666,666)</box>"),
        (np.array([6.4, 4.8, 32, 24], np.float32), (64, 48), "xyxy", "<box>(100,100),(500,500)</box>"),
        (np.array([6, 4, 32, 24]), (64, 48), "xyxy", "<box>(93,83),(500,500)</box>"),
        (Box(64, 48, 320, 240), (640, 480), "xyxy", "<box>(100,100),(500,500)</box>"),
        (Box.from_xywh(64, 48, 256, 192), (640, 480), "xyxy", "<box>(100,100),(500,500)</box>"),
    ],
)
def test_box_markup_writes_the_exact_string(box, size, form, expected):
    assert box_markup(box, width=size[0], height=size[1], form=form) == expected


def test_labels_quads_and_lists_of_shapes():
    size = {"width": 1000, "height": 1000}
    assert box_markup([1, 2, 3, 4], label="the dog", **size) == "<ref>the dog</ref><box>(1,2),(3,4)</box>"
    assert (
        quad_markup([(1, 2), (30, 4), (33, 40), (0, 38)], label="停车", **size)
        == "<ref>停车</ref><quad>(1,2),(30,4),(33,40),(0,38)</quad>"
    )
    assert (
        shapes_markup([Box(1, 2, 3, 4), Box(5, 6, 7, 8)], label="a < b", **size)
        == "<ref>a < b</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>"
    )
    assert (
        quad_markup([(-5, 0), (2000, 0), (2000, 10), (-5, 10)], **size) == "<quad>(0,0),(999,0),(999,10),(0,10)</quad>"
    )
    assert grounding_prompt("the left cat") == "<ref>the left cat</ref><box>"


@pytest.mark.parametrize(
    ("box", "form", "message"),
    [
        ([5, 0, 4, 10], "xyxy", "wrong way round"),
        ([0, 5, 10, 4], "xyxy", "wrong way round"),
        ([0, 0, -1, 5], "xywh", "negative size"),
        ([float("nan"), 0, 1, 1], "xyxy", "x1 of a box must be a finite number"),
        ([0, 0, 1, float("inf")], "xyxy", "y2 of a box must be a finite number"),
        ([0, 0, float("nan"), 1], "xywh", "finite"),
        ([1e308, 0, 1e308, 1], "xywh", "finite"),
        ([0, 0, "7", 1], "xyxy", "'7'"),
        ([0, 0, None, 1], "xyxy", "None"),
        (None, "xyxy", "four numbers"),
        ([1, 2, 3], "xyxy", "four numbers"),
        ([1, 2, 3, 4, 5], "xyxy", "four numbers"),
        ([200, 0, 300, 50], "xyxy", "wholly outside"),
        ([100, 0, 100, 50], "xyxy", "wholly outside"),  # pixel columns are 0..99
        ([0, -30, 10, 0], "xyxy", "wholly outside"),  # touches the top edge from outside
        ([0, 0, 10, 10], "cxcywh", "form='cxcywh'"),
        (Box(0, 0, 10, 10), "xywh", "holds corners"),
    ],
)
def test_a_box_that_cannot_be_written_is_refused(box, form, message):
    with pytest.raises(ValueError, match=message):
        box_markup(box, width=100, height=100, form=form)


@pytest.mark.parametrize("size", [(0, 10), (10, -1), (10.5, 10), (float("nan"), 10), ("10", 10), (None, 10)])
def test_an_image_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="positive whole number"):
        box_markup([0, 0, 1, 1], width=size[0], height=size[1])
    with pytest.raises(ValueError, match="positive whole number"):
        Region("box", ((0, 0), (1, 1)), None, (0, 0)).to_pixels(*size)


@pytest.mark.parametrize("quad", [[1, 2, 3, 4, 5, 6, 7, 8], [(1, 2)] * 3, [(1, 2, 3)] * 4, 5, None, [(1, "a")] * 4])
def test_a_quad_that_is_none_is_refused(quad):
    with pytest.raises(ValueError, match="quad"):
        quad_markup(quad, width=100, height=100)


@pytest.mark.parametrize(
    "label",
    ["", " \n", "a<ref>b", "</ref>", "<box>", "x</quad>", "<img>a.png</img>", "</img>", "<imgpad>"]
    + ["<|im_end|>", "hi <|im_start|>", "<|endoftext|>", "<|extra_0|>", "<|extra_204|>"],
)
def test_labels_that_would_forge_markup_are_refused(label):
    with pytest.raises(ValueError, match=r"blank|control token"):
        box_markup([0, 0, 1, 1], width=10, height=10, label=label)
    with pytest.raises(ValueError, match=r"blank|control token"):
        grounding_prompt(label)


@pytest.mark.parametrize(
    "label", ["<|extra_205|>", "<|im_end>", "< ref >", "<REF>", "a<b>c", "(1,2),(3,4)", "naïve 猫"]
)
def test_labels_that_only_resemble_markup_are_kept(label):
    markup = box_markup([0, 0, 1, 1], width=10, height=10, label=label)
    assert parse_grounding(markup).regions[0].label == label
    assert tags(split_markup(markup)) == ["<ref>", "</ref>", "<box>", "</box>"]


def test_a_list_of_no_shapes_is_refused():
    with pytest.raises(ValueError, match="no box or quad"):
        shapes_markup([], width=10, height=10, label="dog")


# --- round trips -----------------------------------------------------------------------------------------------------


def test_markup_to_pixels_to_markup_is_the_identity_for_every_coordinate():
    sizes = [
        *range(1, 65),
        97,
        100,
        224,
        333,
        448,
        480,
        640,
        641,
        719,
        1000,
        1001,
        1080,
        1333,
        1920,
        4032,
        9999,
        65_535,
    ]
    sizes += random.Random(0).sample(range(66, 100_000), 40) + [10**9 + 7]
    for size in sizes:
        for n in range(1000):
            assert grounding._pixel_to_unit(grounding._unit_to_pixel(n, size), size) == n, (n, size)


def test_markup_to_pixels_to_markup_through_the_public_functions():
    generator = random.Random(1)
    for _ in range(2000):
        width, height = generator.randint(1, 5000), generator.randint(1, 5000)
        xs, ys = sorted(generator.choices(range(1000), k=2)), sorted(generator.choices(range(1000), k=2))
        markup = f"<box>({xs[0]},{ys[0]}),({xs[1]},{ys[1]})</box>"
        (region,) = parse_grounding(markup).regions
        assert box_markup(region.to_pixels(width, height), width=width, height=height) == markup
        corners = [tuple(generator.choices(range(1000), k=2)) for _ in range(4)]
        markup = "<quad>" + ",".join(f"({x},{y})" for x, y in corners) + "</quad>"
        (region,) = parse_grounding(markup).regions
        assert quad_markup(region.to_pixels(width, height), width=width, height=height) == markup


def test_to_pixels_is_the_published_mapping():
    (region,) = parse_grounding("<box>(100,250),(999,500)</box>").regions
    assert region.to_pixels(640, 480) == Box(64.0, 120.0, 639.36, 240.0)


def test_pixels_to_markup_to_pixels_stays_within_one_unit():
    generator = random.Random(2)
    for _ in range(5000):
        size = generator.randint(1, 5000)
        low, high = sorted(generator.uniform(0, size) for _ in range(2))
        (region,) = parse_grounding(box_markup([low, 0, high, size], width=size, height=size)).regions
        box = region.to_pixels(size, size)
        for before, after in ((low, box.x1), (high, box.x2), (0, box.y1), (size, box.y2)):
            # The only edge at a full unit is the far side of the image, which 999 stands for.
            assert -1e-9 <= before - after <= size / 1000 * (1 + 1e-12), (before, after, size)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_reading_a_reply():
    text = "The <ref>dog</ref><box>(1,2),(3,4)</box> and a <ref>stop sign</ref><quad>(1,2),(3,4),(5,6),(7,8)</quad>."
    found = parse_grounding(text)
    assert found.problems == ()
    assert [(region.kind, region.label, region.points) for region in found.regions] == [
        ("box", "dog", ((1, 2), (3, 4))),
        ("quad", "stop sign", ((1, 2), (3, 4), (5, 6), (7, 8))),
    ]
    assert [text[slice(*region.span)] for region in found.regions] == [
        "<box>(1,2),(3,4)</box>",
        "<quad>(1,2),(3,4),(5,6),(7,8)</quad>",
    ]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("<ref>a</ref><box>(1,2),(3,4)</box><box>(1,2),(3,4)</box>", ["a", "a"]),
        (
            "<ref>a</ref> <box>(1,2),(3,4)</box>, <quad>(1,2),(3,4),(5,6),(7,8)</quad>\n<box>(1,2),(3,4)</box>",
            ["a"] * 3,
        ),
        ("<ref>a</ref><box>(1,2),(3,4)</box> and <box>(1,2),(3,4)</box>", ["a", None]),
        ("<ref>a</ref> is at <box>(1,2),(3,4)</box>", [None]),
        ("<box>(1,2),(3,4)</box>", [None]),
        ("<ref>a</ref><ref>b</ref><box>(1,2),(3,4)</box>", ["b"]),
        ("<ref>a</ref><box>nowhere</box><box>(1,2),(3,4)</box>", ["a"]),  # the unreadable one is part of the list
        ("<ref>a</ref><|im_end|><box>(1,2),(3,4)</box>", [None]),
        ("<ref>a</ref><box>(1,2),(3,4)</box><ref></ref><box>(1,2),(3,4)</box>", ["a", None]),
        ("<ref>where is it?</ref>", []),
    ],
)
def test_which_phrase_a_box_belongs_to(text, labels):
    assert [region.label for region in parse_grounding(text).regions] == labels


@pytest.mark.parametrize(
    ("text", "points", "reason"),
    [
        ("<box>(1000,2),(3000,4)</box>", ((999, 2), (999, 4)), "coordinate 1000 is outside 0..999, read as 999"),
        ("<box>(-3,2),(5,4)</box>", ((0, 2), (5, 4)), "coordinate -3 is outside"),
        ("<box>(30,2),(3,40)</box>", ((3, 2), (30, 40)), "wrong way round"),
        ("<box> (1, 2) , (3,4)\n</box>", ((1, 2), (3, 4)), "not written exactly"),
        ("<box>(0001,2),(3,4)</box>", ((1, 2), (3, 4)), "not written exactly"),
        ("<box>(1,2),(3,4)", ((1, 2), (3, 4)), "no </box>"),
        ("<box>(1,2),(3,4)<|im_end|>", ((1, 2), (3, 4)), "no </box>"),
        (
            "<box>(" + "9" * 10_000 + ",2),(" + "0" * 10_000 + ",4)</box>",
            ((0, 2), (999, 4)),
            "coordinate 999999999999 is",
        ),
    ],
)
def test_what_a_model_gets_slightly_wrong_is_read_and_reported(text, points, reason):
    found = parse_grounding(text)
    assert [region.points for region in found.regions] == [points]
    (problem,) = found.problems
    assert problem.repaired
    assert reason in problem.reason
    assert problem.span[0] == 0


@pytest.mark.parametrize(
    ("text", "piece", "reason"),
    [
        ("x <box>(1,2),(3</box>", "<box>(1,2),(3</box>", "holds '(1,2),(3'"),
        ("x <box>(1,2),(3", "<box>(1,2),(3", "no </box>"),
        ("x <box></box>", "<box></box>", "holds ''"),
        ("<box>(1.5,2),(3,4)</box>", "<box>(1.5,2),(3,4)</box>", "in integers"),
        ("<box>(１,2),(3,4)</box>", "<box>(１,2),(3,4)</box>", "in integers"),  # a full-width digit is no coordinate
        ("<box>(1,2),(3,4),(5,6),(7,8)</box>", "<box>(1,2),(3,4),(5,6),(7,8)</box>", "4 points, not 2"),
        ("<quad>(1,2),(3,4)</quad>", "<quad>(1,2),(3,4)</quad>", "2 points, not 4"),
        ("a </box> b", "</box>", "no <box> before"),
        ("<ref></ref>", "<ref></ref>", "holds no text"),
        ("<ref> \n</ref>", "<ref> \n</ref>", "holds no text"),
        ("see <ref>the dog", "<ref>the dog", "no </ref>"),
    ],
)
def test_what_cannot_be_read_is_reported_with_its_place(text, piece, reason):
    found = parse_grounding(text)
    assert found.regions == ()
    (problem,) = found.problems
    assert not problem.repaired
    assert text[slice(*problem.span)] == piece
    assert reason in problem.reason


def test_a_completed_grounding_prompt_is_read():
    (region,) = parse_grounding(BOX_OPEN + "(10,20),(30,40)</box><|endoftext|>").regions
    assert region.points == ((10, 20), (30, 40))


# --- splitting for the tokenizer, stripping for people ---------------------------------------------------------------


def test_split_marks_the_tags_of_well_formed_markup():
    assert split_markup("See <ref>a dog</ref><box>(1,2),(3,4)</box>!") == [
        ("See ", False),
        ("<ref>", True),
        ("a dog", False),
        ("</ref>", True),
        ("<box>", True),
        ("(1,2),(3,4)", False),
        ("</box>", True),
        ("!", False),
    ]
    quad = split_markup("<quad>(0,0),(999,0),(999,999),(0,999)</quad>")
    assert tags(quad) == ["<quad>", "</quad>"]
    assert split_markup("") == []
    assert split_markup("plain <b>text</b>") == [("plain <b>text</b>", False)]


@pytest.mark.parametrize(
    "text",
    [
        "x<box>y",
        "<ref></ref>",
        "<ref>  </ref>",
        "<ref>a<box></ref>",
        "<ref>a<|im_end|></ref>",
        "<ref>a<img></ref>",
        "</ref>a<ref>",
        "<box>(1,2),(3,4)</quad>",
        "<box>(1,2),(3,1000)</box>",
        "<box>(1,2),(3,-4)</box>",
        "<box>(1, 2),(3,4)</box>",
        "<box>(1,2),(3,4)\n</box>",
        "<box>(1,2)(3,4)</box>",
        "<box>(1,2),(3,４)</box>",
        "<box>(1,2),(3,4),(5,6),(7,8)</box>",
        "<quad>(1,2),(3,4)</quad>",
        "<BOX>(1,2),(3,4)</BOX>",
        "the tag <box> opens a box, </box> closes it",
        "<box>",
    ],
)
def test_everything_else_stays_one_ordinary_piece(text):
    assert split_markup(text) == [(text, False)]


def test_a_broken_element_does_not_take_its_neighbours_along():
    text = "<ref>a<ref>b</ref><box>(1,2)</box><box>(1,2),(3,4)</box></box>"
    assert split_markup(text) == [
        ("<ref>a", False),
        ("<ref>", True),
        ("b", False),
        ("</ref>", True),
        ("<box>(1,2)</box>", False),
        ("<box>", True),
        ("(1,2),(3,4)", False),
        ("</box>", True),
        ("</box>", False),
    ]


def test_an_open_box_is_a_token_only_at_the_end_and_when_asked_for():
    prompt = "Find " + grounding_prompt("it")
    assert tags(split_markup(prompt)) == ["<ref>", "</ref>"]
    assert tags(split_markup(prompt, open_box=True)) == ["<ref>", "</ref>", "<box>"]
    assert split_markup("<box>", open_box=True) == [("<box>", True)]
    assert tags(split_markup(prompt + "\n", open_box=True)) == ["<ref>", "</ref>"]
    assert tags(split_markup("<box><box>", open_box=True)) == ["<box>"]
    assert tags(split_markup("<quad>", open_box=True)) == []


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The <ref>dog</ref><box>(1,2),(3,4)</box> runs.", "The dog runs."),
        ("<box>(1,2),(3,4)</box> is a dog", "is a dog"),
        ("Here <box>(1,2),(3,4)</box> it is", "Here it is"),
        ("<ref>Dogs</ref><box>(1,2),(3,4)</box><box>(1,2),(3,4)</box>\nCats", "Dogs\nCats"),
        ("a <quad>(1,2),(3,4),(5,6),(7,8)</quad><ref>b</ref> c", "a b c"),
        ("cut <ref>dog</ref><box>(1,2),(1000,4)", "cut dog"),
        ("bad <box>(1,2)</box> </ref>", "bad <box>(1,2)</box> </ref>"),
        ("  spaces   stay  ", "  spaces   stay  "),
        ("", ""),
    ],
)
def test_strip_leaves_what_a_person_reads(text, plain):
    assert strip_markup(text) == plain


# --- any string at all -----------------------------------------------------------------------------------------------

FRAGMENTS = [
    *(GROUNDING_TAGS * 2),
    *("(1,2),(3,4)", "(1,2),(3,4),(5,6),(7,8)", "<box>(1,2),(3,4)</box>", "<ref>dog</ref>"),
    *("<quad>(1,2),(3,4),(5,6),(7,8)</quad>", "<box>(7,2),(1000,0)</box>", "<ref>dog</ref><box>( 1,2),(3,4)"),
    *(
        "(",
        ")",
        ",",
        "1",
        "999",
        "1000",
        "-",
        " ",
        "\n",
        "dog",
        "狗",
        "\u0338",
        "<",
        ">",
        "<ref",
        "/box>",
        "<box",
        "\x00",
    ),
    *("<img>", "</img>", "<imgpad>", "<|im_end|>", "<|extra_7|>", "<|", "|>", "\ud800", "𝟙"),
]


def test_twenty_thousand_random_strings():
    generator = random.Random(3)
    regions = problems = 0
    for _ in range(20_000):
        text = "".join(generator.choices(FRAGMENTS, k=generator.randint(0, 14)))
        found = parse_grounding(text)
        for open_box in (False, True):
            pieces = split_markup(text, open_box=open_box)
            assert join(pieces) == text
            assert all(piece for piece, _ in pieces)
            assert all(piece in GROUNDING_TAGS for piece, is_tag in pieces if is_tag)
            assert not any(not a and not b for (_, a), (_, b) in itertools.pairwise(pieces))
        for region in found.regions:
            assert all(0 <= value <= 999 for point in region.points for value in point)
            again = parse_grounding(shapes_markup([region.to_pixels(640, 480)], width=640, height=480))
            assert again.problems == ()
            assert again.regions[0].points == region.points
        for start, end in [item.span for item in (*found.regions, *found.problems)]:
            assert 0 <= start < end <= len(text)
        # What is not reported becomes tokens: markup in training data cannot turn into text unnoticed.
        if not found.problems:
            assert len(tags(split_markup(text))) == sum(text.count(tag) for tag in GROUNDING_TAGS)
        strip_markup(text)
        regions, problems = regions + len(found.regions), problems + len(found.problems)
    assert regions > 5000  # the strings do reach the reader
    assert problems > 5000


@pytest.mark.parametrize(
    ("opening", "unit"),
    [
        ("", "<box>("),
        ("", "<ref>a</ref>"),
        ("<ref>a</ref>", "<box>(1,2),(3,4)</box>,"),
        ("<box>(1,2),(3,4)", "(1,2),"),
        ("<box>", "(1,2),"),
        ("<box>(1,2),(3,4)", " "),
        ("<box>(1,", "9"),
        ("<ref>a</ref>", " "),
        ("<ref>", "<|"),
    ],
)
def test_a_megabyte_is_read_in_linear_time(opening, unit):
    text = opening + unit * (1_000_000 // len(unit))
    seconds = []
    for piece in (text[: len(text) // 16], text):
        started = time.perf_counter()
        parse_grounding(piece)
        split_markup(piece)
        seconds.append(time.perf_counter() - started)
    # Sixteen times the text: 16x if linear, 256x if quadratic. The constant covers a busy machine.
    assert seconds[1] < 48 * seconds[0] + 0.5


def test_no_tensor_library_is_imported():
    tree = ast.parse(Path(grounding.__file__).read_text(encoding="utf-8"))
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported == {"math", "re", "collections.abc", "dataclasses", "fractions", "numbers", "typing"}
