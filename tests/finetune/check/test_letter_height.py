"""The height of letters is found on pages of known type, and nothing is found where there is no text."""

import random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from examples.nano.making.documents.document import make_document
from finetune.check.letter_height import letter_height

WORDS = ("the", "of", "and", "invoice", "number", "total", "amount", "date", "payment", "price", "goods")


def typed(width, height, size, *, capitals=False, dark=False, turned=0.0, noise=0):
    """A page full of words, and the height of its small letters, or of its capitals."""
    draw, font = random.Random(0), ImageFont.load_default(size)
    paper, ink = (30, 235) if dark else (250, 20)
    image = Image.new("L", (width, height), paper)
    pen = ImageDraw.Draw(image)
    for y in range(size, height - 2 * size, round(1.4 * size)):
        x = size
        while x < width - 6 * size:
            word = draw.choice(WORDS).upper() if capitals else draw.choice(WORDS)
            pen.text((x, y), word, font=font, fill=ink)
            x += pen.textlength(word + " ", font=font)
    image = image.rotate(turned, Image.Resampling.BICUBIC, fillcolor=paper)
    if noise:
        levels = np.asarray(image, np.int16) + np.random.default_rng(0).normal(0, noise, (height, width))
        image = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    _, top, _, bottom = font.getbbox("H" if capitals else "x")
    return image.convert("RGB"), bottom - top


@pytest.mark.parametrize(
    "page",
    [
        {"width": 400, "height": 500, "size": 10},
        {"width": 600, "height": 800, "size": 14, "noise": 12},
        {"width": 1240, "height": 1754, "size": 24},
        {"width": 1240, "height": 1754, "size": 24, "capitals": True},
        {"width": 1240, "height": 1754, "size": 24, "dark": True},
        {"width": 2480, "height": 3508, "size": 40, "turned": 1.5},
        {"width": 3508, "height": 2480, "size": 30, "noise": 12},
    ],
)
def test_letters_of_known_type(page):
    image, height = typed(**page)
    assert letter_height(image) == pytest.approx(height, rel=0.15)


def test_letters_that_are_gone_in_a_large_drawing_are_found_in_its_middle():
    image = Image.new("RGB", (6000, 6000), "white")
    part, height = typed(800, 800, 12)
    image.paste(part, (2600, 2600))
    assert letter_height(image) == pytest.approx(height, abs=1)


@pytest.mark.parametrize("family", ["form", "receipt", "table", "label", "boarding", "register"])
def test_letters_of_the_generator(family):
    """Its small letters have 7 pixels, capitals and numbers 9."""
    for index in range(4):
        found = letter_height(make_document(family, seed=0, split="train", index=index).image)
        assert 7 <= found <= 10, index


def leaves():
    draw = np.random.default_rng(1)
    image = Image.new("RGB", (900, 700), (90, 120, 70))
    for _ in range(5000):
        (x, y), (a, b) = draw.uniform(0, 900, 2), draw.uniform(2, 15, 2)
        colour = tuple(int(level) for level in draw.uniform(0, 255, 3))
        ImageDraw.Draw(image).ellipse((x - a, y - b, x + a, y + b), fill=colour)
    return image


def clouds(exponent):
    """Noise with a spectrum of f^-exponent: 1 is that of photographs, 0 that of sand."""
    draw = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(700)[:, None], np.fft.fftfreq(900)[None]) + 1e-4
    field = np.fft.ifft2(np.fft.fft2(draw.normal(size=(700, 900))) / frequency**exponent).real
    return Image.fromarray(((field - field.min()) / np.ptp(field) * 255).astype(np.uint8))


def wall(width, height, fill=(120, 60, 40)):
    image = Image.new("RGB", (900, 700), (200, 200, 190))
    for y in range(10, 690 - height, height + 4):
        for x in range(10, 890 - width, width + 4):
            ImageDraw.Draw(image).rectangle((x, y, x + width, y + height), fill=fill)
    return image


def chart():
    image = Image.new("RGB", (800, 600), "white")
    pen = ImageDraw.Draw(image)
    for number in range(12):
        pen.rectangle((60 + 60 * number, 80 + 30 * (number * 7 % 12), 95 + 60 * number, 540), fill=(40, 90, 200))
    pen.line((50, 40, 50, 540, 780, 540), fill=0, width=2)
    return image


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (1000, 1400), "white"),
        Image.new("RGB", (1, 1)),
        Image.new("RGB", (20, 9000)),
        leaves(),
        clouds(0),
        clouds(0.5),
        clouds(1),
        wall(60, 20),
        wall(16, 8),
        chart(),
        *(make_document("shapes", seed=0, split="train", index=index).image for index in range(3)),
    ],
)
def test_what_is_no_text(image):
    assert letter_height(image) is None
