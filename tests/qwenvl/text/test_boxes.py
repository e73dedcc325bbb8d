"""Pixel boxes and quads as markup: exact strings and exact round trips."""

import random

import numpy as np
import pytest

from qwenvl.errors import InputError
from qwenvl.text import boxes
from qwenvl.text.boxes import Box, box_markup, quad_markup, shapes_markup
from qwenvl.text.grounding import Region, grounding_prompt, parse_grounding, split_markup


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
    with pytest.raises(InputError, match=message):
        box_markup(box, width=100, height=100, form=form)


@pytest.mark.parametrize("size", [(0, 10), (10, -1), (10.5, 10), (float("nan"), 10), ("10", 10), (None, 10)])
def test_an_image_size_that_is_none_is_refused(size):
    with pytest.raises(InputError, match="positive whole number"):
        box_markup([0, 0, 1, 1], width=size[0], height=size[1])
    with pytest.raises(InputError, match="positive whole number"):
        Region("box", ((0, 0), (1, 1)), None, (0, 0)).to_pixels(*size)


@pytest.mark.parametrize("quad", [[1, 2, 3, 4, 5, 6, 7, 8], [(1, 2)] * 3, [(1, 2, 3)] * 4, 5, None, [(1, "a")] * 4])
def test_a_quad_that_is_none_is_refused(quad):
    with pytest.raises(InputError, match="quad"):
        quad_markup(quad, width=100, height=100)


@pytest.mark.parametrize(
    "label",
    ["", " \n", "a<ref>b", "</ref>", "<box>", "x</quad>", "<img>a.png</img>", "</img>", "<imgpad>"]
    + ["<|im_end|>", "hi <|im_start|>", "<|endoftext|>", "<|extra_0|>", "<|extra_204|>"],
)
def test_labels_that_would_forge_markup_are_refused(label):
    with pytest.raises(InputError, match=r"blank|control token"):
        box_markup([0, 0, 1, 1], width=10, height=10, label=label)
    with pytest.raises(InputError, match=r"blank|control token"):
        grounding_prompt(label)


@pytest.mark.parametrize(
    "label", ["<|extra_205|>", "<|im_end>", "< ref >", "<REF>", "a<b>c", "(1,2),(3,4)", "naïve 猫"]
)
def test_labels_that_only_resemble_markup_are_kept(label):
    markup = box_markup([0, 0, 1, 1], width=10, height=10, label=label)
    assert parse_grounding(markup).regions[0].label == label
    assert [piece for piece, is_tag in split_markup(markup) if is_tag] == ["<ref>", "</ref>", "<box>", "</box>"]


def test_a_list_of_no_shapes_is_refused():
    with pytest.raises(InputError, match="no box or quad"):
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
            assert boxes._pixel_to_unit(boxes.unit_to_pixel(n, size), size) == n, (n, size)


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
