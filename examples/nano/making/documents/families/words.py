"""Family `words`: lines of made-up words, numbers, dates and codes at random places, to be transcribed."""

import random

from examples.nano.making.documents.lettering import Look, fitted, sample_look, width
from examples.nano.making.documents.page import MARGIN
from examples.nano.making.documents.sheet import Choices, Sheet
from examples.nano.making.documents.values import SHORTEST, Value

KINDS = (
    "word",
    "word",
    "word",
    "word",
    "number",
    "date",
    "code",
    "name",
    "city",
    "time",
    "price",
    "weight",
    "percent",
)


def words(sheet: Sheet) -> None:
    """Lines from top to bottom; the words of a line are separated by clear gaps."""
    page, draw = sheet.page, sheet.draw
    looks = [sample_look(draw) for _ in range(3)]
    height = max(look.line_height for look in looks)
    most = min(10, (page.size - 2 * MARGIN) // (height + 1))
    choices = sheet.choose(lambda draw: _layout(draw, most))
    slots = sorted(draw.sample(range(most), len(choices["line"])))
    step = (page.size - 2 * MARGIN) / most
    for slot, count in zip(slots, choices["line"], strict=True):
        top = MARGIN - 1 + slot * step + draw.uniform(0, step - height)
        _line(sheet, count, top, choices["at"], looks)


def _layout(draw: random.Random, most: int) -> Choices:
    lines = draw.randint(1, most)
    return {
        "line": [draw.choice((1, 1, 2, 2, 3)) for _ in range(lines)],
        "at": draw.choice(("left", "right", "anywhere", "anywhere")),
    }


def _line(sheet: Sheet, count: int, top: float, at: str, looks: list[Look]) -> None:
    """Write a line of `count` values."""
    page, draw = sheet.page, sheet.draw
    look = draw.choice(looks)
    gap = max(5, look.size // 2)
    longest = max(5, int(page.inner / count / look.size * 1.6))
    kinds = [kind for kind in KINDS if SHORTEST.get(kind, 2) + 2 < longest or kind == "word"]
    values = [sheet.values.new(draw.choice(kinds), longest=longest) for _ in range(count)]
    room = page.inner - gap * (count - 1)
    total = sum(width(value.text, look) for value in values)
    if total > room:  # all of them squeezed alike
        whole = "".join(value.text for value in values)
        look = fitted(whole, look, room - 2 * count)
        total = sum(width(value.text, look) for value in values)
    spare = max(0.0, room - total)
    x = MARGIN + {"left": 0.0, "right": spare, "anywhere": draw.uniform(0, spare)}[at]
    left = x
    boxes = []
    for value in values:
        boxes.append(page.write(value.text, x, top, look))
        x = max(x + width(value.text, look), boxes[-1][2]) + gap
    # A line of several values has a kind of its own.
    line = Value(" ".join(value.text for value in values), values[0].kind if count == 1 else "line")
    box = (min(left, boxes[0][0]), min(b[1] for b in boxes), boxes[-1][2], max(b[3] for b in boxes))
    sheet.lines.append(line.text)
    sheet.add("line", "", line, box)
    if count > 1:
        for value, place in zip(values, boxes, strict=True):
            sheet.add("word", "", value, place)
