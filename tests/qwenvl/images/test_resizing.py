"""The pixels of `resize`, and so of the image processor, are those that the published models saw, on every Pillow.

The golden numbers are Pillow 12.3.0's for a plain `image.resize((S, S), Image.Resampling.BICUBIC)` of the images
below. 9.5.0, 10.0.0 (of the weeks in which the models were published), 10.1.0, 11.3.0 and 12.1.1 gave the same for all
but "a line down". `make test-pillow` runs this file with another Pillow than the one installed.
"""

from hashlib import blake2b

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from qwenvl import QwenVLImageProcessor
from qwenvl.images.resizing import resize

PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])

# name -> width, height, side, digest of the (side, side, 3) levels
GOLDEN = {
    "tall": (30, 900, 112, "7b2b7c9b2cf386cd"),
    "a receipt": (380, 1900, 448, "ef1563683fd683f6"),
    "a page": (1240, 1754, 448, "86fee9bcd1e6538e"),
    "wide": (900, 30, 112, "ba62384804cafdc9"),
    "a banner": (1600, 200, 448, "6570b1024f17d313"),
    "one pixel": (1, 1, 112, "9ee553e32ee1481f"),
    "tiny": (3, 2, 448, "2f78e898086fda19"),
    "tiny and tall": (2, 7, 112, "498dec18ee064463"),
    "a line down": (3, 2000, 448, "807d8dd0ce74317e"),
    "a line across": (2000, 3, 448, "c971fbe937607912"),
    "huge": (4000, 6000, 448, "0a0f5c3e32990614"),
    "as wide as the square": (448, 1000, 448, "f8ebca1bbf832c02"),
    "as tall as the square": (1000, 448, 448, "60abaa5c81da06e3"),
    "the square": (448, 448, 448, "aa8553068a89bbe2"),
}


def noise(width, height):
    """RandomState's stream is frozen, unlike that of NumPy's newer generators."""
    stream = np.random.RandomState(width * 7919 + height)
    return Image.frombytes("RGB", (width, height), stream.bytes(3 * width * height))


def digest(levels):
    return blake2b(np.ascontiguousarray(levels).tobytes(), digest_size=8).hexdigest()


@pytest.mark.parametrize(("width", "height", "side", "expected"), GOLDEN.values(), ids=GOLDEN)
def test_pixels_of_the_published_era(width, height, side, expected):
    image = noise(width, height)
    before = image.tobytes()
    resized = resize(image, side, side)
    assert resized.size == (side, side) and resized.mode == "RGB"
    assert digest(np.asarray(resized)) == expected
    assert image.tobytes() == before and image.size == (width, height)


def test_every_level_of_a_small_tall_image():
    """Other orders of the passes give other levels: down first, 138 118 116 135, 124 138 133 111, ..."""
    grey = noise(3, 40).convert("L")
    expected = [[138, 117, 116, 135], [125, 139, 133, 112], [122, 128, 148, 169], [114, 145, 155, 138]]
    assert np.asarray(resize(grey, 4, 4)).tolist() == expected
    down_first = grey.resize((3, 4), Image.Resampling.BICUBIC).resize((4, 4), Image.Resampling.BICUBIC)
    assert np.asarray(down_first).tolist() != expected


@pytest.mark.parametrize("name", ["a receipt", "wide", "one pixel", "the square"])
def test_what_the_model_sees(name):
    width, height, side, expected = GOLDEN[name]
    levels = QwenVLImageProcessor(size=side)(noise(width, height), do_normalize=False, return_tensors="pt")
    assert levels["pixel_values"].dtype == torch.uint8
    assert digest(levels["pixel_values"][0].permute(1, 2, 0).numpy()) == expected


def test_as_pillows_own_resize_where_that_has_this_order():
    if PILLOW >= (13, 0):
        assert digest(noise(380, 1900).resize((448, 448), Image.Resampling.BICUBIC)) != GOLDEN["a receipt"][3]
        return
    sides = np.random.RandomState(0)
    for _ in range(60):
        width, height, to_width, to_height = (int(2 ** sides.uniform(0, 10)) for _ in range(4))
        own = noise(width, height).resize((to_width, to_height), Image.Resampling.BICUBIC)
        assert digest(resize(noise(width, height), to_width, to_height)) == digest(own), (width, height)


def test_a_line_of_pixels_takes_no_room_between_the_passes(monkeypatch):
    sizes = []
    own = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *how: sizes.append(size) or own(image, size, *how))
    resize(Image.new("L", (1, 500_000)), 448, 448)
    resize(Image.new("L", (500_000, 1)), 448, 448)
    assert sizes == [(1, 448), (448, 448), (448, 1), (448, 448)]


def test_a_side_that_is_right_is_left_alone():
    image = noise(30, 20)
    assert resize(image, 30, 20) is image
    np.testing.assert_array_equal(resize(image, 30, 10), image.resize((30, 10), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize(image, 10, 20), image.resize((10, 20), Image.Resampling.BICUBIC))
