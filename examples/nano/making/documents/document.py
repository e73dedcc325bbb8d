"""A document: its image, what stands where on it, and its lines in reading order. `make_document` makes all of them.

A document depends on (seed, split, index) and on the choices of family, size and difficulty, and on nothing else: not
on the machine, nor on what was made before.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from PIL import Image

from examples.nano.making.documents.page import Box, Page, turned
from examples.nano.making.documents.values import MONEY, DoesNotFit, Value, Values, split_of

SMALLEST_PAGE, LARGEST_PAGE = 112, 448
"""Pixels: below, there is no room for the writing; above, pages would be mostly empty."""

_TRIES = 400


@dataclass(frozen=True, slots=True)
class Field:
    """A value on the page.

    Attributes:
        key: what the value is, the same word whatever the label says: "date".
        label: as printed, "" where it has none.
        value: as printed.
        box: of the value's ink.
        kind: of the value, see `values.KINDS` and `values.CLOSED_KINDS`.
        names: what a question may call it, without an article: ("issued", "date"); none where it is not asked for.
        asks: whole questions that are about this field only.
        amount: see `Value`.
    """

    key: str
    label: str
    value: str
    box: Box
    kind: str
    names: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()
    amount: float | None = None


@dataclass(frozen=True, slots=True)
class Fact:
    """A question about the page as a whole, in several wordings, and its answer."""

    asks: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class Document:
    """A page and all that is known of it.

    Attributes:
        family: of `families.FAMILIES`.
        layout: the choices that say where things stand, as text; it belongs to the document's split.
        image: RGB, square.
        fields: in reading order.
        facts: questions beyond the fields.
        lines: the printed text in reading order; empty for pictures of shapes.
        money: of `values.MONEY`, how its prices are printed.
        letters: every printed letter with the (x, y) of its middle, pixels.
    """

    family: str
    layout: str
    image: Image.Image
    fields: tuple[Field, ...]
    facts: tuple[Fact, ...]
    lines: tuple[str, ...]
    money: str
    letters: tuple[tuple[str, float, float], ...]


@dataclass
class Sheet:
    """What a family works with: a blank page, values to print, random numbers, and places for what it made."""

    family: str
    page: Page
    values: Values
    draw: random.Random
    layout: str = ""
    fields: list[Field] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def choose(self, make: Callable[[random.Random], dict]) -> dict:
        """Choices of a layout: those that `make` draws, drawn again until they belong to the document's split."""
        for _ in range(_TRIES):
            choices = make(self.draw)
            written = " ".join(f"{name}={_written(choice)}" for name, choice in choices.items())
            self.layout = f"{self.family}: {written}"
            if split_of(self.layout) == self.values.split:
                return choices
        raise DoesNotFit

    def add(self, key: str, label: str, value: Value, box: Box, names: Sequence[str] = (), asks: Sequence[str] = ()):
        """Note a value that was written."""
        names = tuple(dict.fromkeys(names))
        self.fields.append(Field(key, label, value.text, box, value.kind, names, tuple(asks), value.amount))


def make_document(
    family: str, *, seed: int, split: str, index: int, image_size: int = 140, difficulty: float = 0.5, copy: int = 0
) -> Document:
    """The document of a family with a number.

    Args:
        family: of `families.FAMILIES`.
        seed, split, index: name it, together with `copy`; split is "train", "validation" or "test".
        image_size: width and height, pixels, `SMALLEST_PAGE` to `LARGEST_PAGE`.
        difficulty: see `Page`.
        copy: 1 is a second document to be compared with: its prices are in the same currency.
    """
    from examples.nano.making.documents.families import FAMILIES

    name = f"{seed}/{split}/{family}/{index}"
    money = random.Random(f"{name}/money").choice(MONEY)
    draw = random.Random(f"{name}/{copy}")
    for _ in range(_TRIES):
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
    raise AssertionError(f"{name}: no page of {image_size} px in {_TRIES} tries")


def _written(choice: object) -> str:
    return "+".join(map(str, choice)) if isinstance(choice, list | tuple) else str(choice)
