"""Pages full of text, from which the vision side learns letters. They have more than twice as many as documents.

Words are values as documents print them, or random letters and digits, so that rare characters occur too.
"""

import random
import string
from contextlib import suppress

from examples.nano.making.documents.document import Document
from examples.nano.making.documents.families.words import KINDS
from examples.nano.making.documents.lettering import Look, sample_look, width
from examples.nano.making.documents.page import MARGIN, Page, turned
from examples.nano.making.documents.values import MONEY, DoesNotFit, Values

AT_RANDOM = 0.25  # share of the words
LETTERS = string.ascii_letters + string.digits + ".,:-/%$"
CAPITALS, MUTED = 0.15, 0.2  # shares of the words


def dense_page(name: str, size: int, difficulty: float) -> Document:
    """The page of this name, filled from edge to edge; it has no fields to ask about."""
    draw = random.Random(name)
    page = Page(size, draw, difficulty)
    values = Values(draw, "train", draw.choice(MONEY))
    y = MARGIN - 2 + draw.uniform(0, 8)
    while y + (look := sample_look(draw)).line_height < size - 1:
        x = MARGIN + draw.uniform(0, 10)
        while text := _beginning(_word(draw, values), look, size - MARGIN - x):
            page.write(text, x, y, look, colour=page.muted if draw.random() < MUTED else None)
            x += width(text, look) + draw.uniform(3, 9)
        y += look.line_height + draw.uniform(-2, 1)
    image, angle = page.finish()
    letters = [(letter, *turned((x, y, x, y), size, angle)[:2]) for letter, x, y in page.letters]
    return Document("dense", "", image, (), (), (), "", tuple(letters))


def _beginning(text: str, look: Look, room: float) -> str:
    """The longest beginning of a text that fits into `room` pixels."""
    while text and width(text, look) > room:
        text = text[:-1].rstrip()
    return text


def _word(draw: random.Random, values: Values) -> str:
    if draw.random() >= AT_RANDOM:
        with suppress(DoesNotFit):  # a kind with few values may be used up
            return values.new(draw.choice(KINDS), upper=draw.random() < CAPITALS).text
    return "".join(draw.choices(LETTERS, k=draw.randint(2, 7)))
