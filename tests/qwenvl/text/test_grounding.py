"""Grounding markup read: what a model says, split for the tokenizer, and no string that breaks the reader."""

import ast
import itertools
import random
from pathlib import Path

import pytest

from qwenvl.text import grounding
from qwenvl.text.boxes import shapes_markup
from qwenvl.text.grounding import clamp_to_edge, grounding_prompt, parse_grounding, split_markup, strip_markup
from qwenvl.text.vocabulary import GROUNDING_TOKENS


def join(pieces):
    return "".join(piece for piece, _ in pieces)


def tags(pieces):
    return [piece for piece, is_tag in pieces if is_tag]


def coordinates(markup):
    return [region.points for region in parse_grounding(markup).regions]


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
    (region,) = parse_grounding("<box>(10,20),(30,40)</box><|endoftext|>").regions
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
    *(GROUNDING_TOKENS * 2),
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
            assert all(piece in GROUNDING_TOKENS for piece, is_tag in pieces if is_tag)
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
            assert len(tags(split_markup(text))) == sum(text.count(tag) for tag in GROUNDING_TOKENS)
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
def test_a_megabyte_is_read(opening, unit):
    """A reader that backtracks, or is quadratic, would not come back from these."""
    text = opening + unit * (1_000_000 // len(unit))
    parse_grounding(text)
    assert join(split_markup(text)) == text


def test_no_tensor_library_is_imported():
    tree = ast.parse(Path(grounding.__file__).read_text(encoding="utf-8"))
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported <= {
        "re",
        "collections.abc",
        "dataclasses",
        "typing",
        "qwenvl.text.boxes",
        "qwenvl.text.vocabulary",
    }


# --- the far edge ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("<box>(0,0),(1000,1000)</box>", "<box>(0,0),(999,999)</box>"),
        ("<quad>(1000,0),(1,1),(2,1000),(3,3)</quad>", "<quad>(999,0),(1,1),(2,999),(3,3)</quad>"),
        ("<box>(0, 1000), (5,5)</box>", "<box>(0, 999), (5,5)</box>"),
        ("<box>(0,1000),(5", "<box>(0,1000),(5"),
        ("<box>(1,1),(1001,10000)</box>", "<box>(1,1),(1001,10000)</box>"),
        ("<box>(-1000,1),(2,2)</box>", "<box>(-1000,1),(2,2)</box>"),
        ("<ref>1000</ref> costs 1000", "<ref>1000</ref> costs 1000"),
        ("<box>1000 boxes</box>", "<box>1000 boxes</box>"),
    ],
)
def test_1000_in_coordinates_alone_becomes_999(text, inside):
    assert clamp_to_edge(text) == inside == clamp_to_edge(inside)
