"""A document: its image, what stands where on it, and its lines in reading order. `make_document` makes all of them.

A document is a function of (seed, split, index, copy) and of the chosen family, size and difficulty. It does not
depend on the machine or on the documents made before it.
"""

import random
from dataclasses import dataclass, replace

from PIL import Image

from examples.nano.making.documents.families import FAMILIES
from examples.nano.making.documents.page import Page, turned
from examples.nano.making.documents.sheet import Fact, Field, Sheet
from examples.nano.making.documents.values import MONEY, TRIES, DoesNotFit, Values

SMALLEST_PAGE, LARGEST_PAGE = 112, 448
"""Pixels of a side. Below, lines do not fit; above, pages would be mostly empty."""


@dataclass(frozen=True, slots=True)
class Document:
    """A page and all that is known about it.

    Attributes:
        family: one of `families.FAMILIES`.
        layout: the choices that fix where things stand, as text; like values, it belongs to one split.
        image: RGB, square.
        fields: in reading order.
        facts: questions about the page as a whole.
        lines: the printed text in reading order; empty for pictures of shapes.
        money: how its prices are printed, one of `values.MONEY`.
        letters: every printed letter with the (x, y) of its centre in pixels.
    """

    family: str
    layout: str
    image: Image.Image
    fields: tuple[Field, ...]
    facts: tuple[Fact, ...]
    lines: tuple[str, ...]
    money: str
    letters: tuple[tuple[str, float, float], ...]


def make_document(
    family: str, *, seed: int, split: str, index: int, image_size: int = 140, difficulty: float = 0.5, copy: int = 0
) -> Document:
    """Make a document.

    Args:
        family: one of `families.FAMILIES`.
        seed, split, index, copy: name the document; split is "train", "validation" or "test".
        image_size: width and height in pixels, `SMALLEST_PAGE` to `LARGEST_PAGE`.
        difficulty: see `Page`.
        copy: 1 for a second document to compare the first with; its prices are in the same currency.
    """
    name = f"{seed}/{split}/{family}/{index}"
    money = random.Random(f"{name}/money").choice(MONEY)
    draw = random.Random(f"{name}/{copy}")
    for _ in range(TRIES):
        sheet = Sheet(family, Page(image_size, draw, difficulty), Values(draw, split, money), draw)
        try:
            FAMILIES[family](sheet)
        except DoesNotFit:
            continue
        image, angle = sheet.page.finish()
        fields = [replace(field, box=turned(field.box, image_size, angle)) for field in sheet.fields]
        letters = [
            (letter, *turned((x, y, x, y), image_size, angle)[:2]) if angle else (letter, x, y)
            for letter, x, y in sheet.page.letters
        ]
        return Document(
            family,
            sheet.layout,
            image,
            tuple(fields),
            tuple(sheet.facts),
            tuple(sheet.lines),
            money,
            tuple(letters),
        )
    raise AssertionError(f"{name}: no page of {image_size} px in {TRIES} tries")
