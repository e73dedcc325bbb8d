"""Questions about pictures of shapes: turns of (question, reply)."""

import random
from collections import Counter

from examples.nano.making.documents import phrasings
from examples.nano.making.documents.document import Document
from examples.nano.making.documents.word_lists import COLOURS, SHAPES

Turn = tuple[str, str]


def count(document: Document, draw: random.Random) -> Turn:
    """The number of shapes of a kind, of a colour, or in all; it may be 0."""
    others = "shapes", f"{draw.choice(list(COLOURS))} shapes", _plural(draw.choice(SHAPES))
    what = draw.choice((*_plurals(document), *others))
    return _asked(draw.choice(phrasings.COUNT), what), str(number_of(document, what))


def two_counts(document: Document, draw: random.Random) -> list[Turn] | None:
    """The numbers of two kinds of shapes; the second question is short."""
    plurals = _plurals(document)
    if len(plurals) < 2:
        return None
    first, second = draw.sample(plurals, 2)
    return [
        (_asked(draw.choice(phrasings.COUNT), first), str(number_of(document, first))),
        (draw.choice(phrasings.COUNT_MORE).format(what=second), str(number_of(document, second))),
    ]


def more_on_which(one: Document, two: Document, draw: random.Random) -> list[Turn] | None:
    """Which of two pictures has more of something."""
    candidates = ["shapes", *dict.fromkeys([*_plurals(one), *_plurals(two)])]
    differing = [what for what in candidates if number_of(one, what) != number_of(two, what)]
    if not differing:
        return None
    what = draw.choice(differing)
    numbers = number_of(one, what), number_of(two, what)
    answer = phrasings.compared(*numbers, first=numbers[0] > numbers[1])
    return [(draw.choice(phrasings.MORE_SHAPES).format(what=what), answer)]


def colour(document: Document, draw: random.Random) -> Turn | None:
    """The colour of the only shape of its kind."""
    kinds = Counter(field.key for field in document.fields)
    single = [field for field in document.fields if kinds[field.key] == 1]
    if not single:
        return None
    field = draw.choice(single)
    return draw.choice(phrasings.COLOUR).format(shape=field.key), field.label


def is_there(document: Document, draw: random.Random) -> Turn:
    """Whether there is a shape of this kind and colour. If not, there may be one of the same kind or colour."""
    there = [field.value for field in document.fields]
    if draw.random() < 0.5:
        what, answer = draw.choice(there), "Yes"
    else:
        field = draw.choice(document.fields)
        near = [f"{field.label} {shape}" for shape in SHAPES] + [f"{name} {field.key}" for name in COLOURS]
        what, answer = draw.choice([what for what in near if what not in there]), "No"
    return draw.choice(phrasings.IS_THERE).format(what=what).replace("a orange", "an orange"), answer


def number_of(document: Document, what: str) -> int:
    """The number of "shapes", "red shapes" or "circles"."""
    first, _, second = what.partition(" ")
    if what == "shapes":
        return len(document.fields)
    if second:
        return sum(field.label == first for field in document.fields)
    return sum(_plural(field.key) == what for field in document.fields)


def _plurals(document: Document) -> list[str]:
    """The kinds and colours of a picture: "circles", "red shapes"."""
    kinds = [_plural(field.key) for field in document.fields]
    return list(dict.fromkeys([*kinds, *(f"{field.label} shapes" for field in document.fields)]))


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def _asked(wording: str, what: str) -> str:
    text = wording.format(what=what)
    return text[0].upper() + text[1:]
