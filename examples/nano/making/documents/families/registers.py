"""Family `register`: columns of short lines from edge to edge, each a label and its value.

Made for pages larger than the nano sees: at twice its size, letters of the usual height are read in a quarter of the
page and hardly in the page as a whole. Labels are those of cards, and do not tell the kind of the value.
"""

import random

from examples.nano.making.documents import word_lists as lists
from examples.nano.making.documents.lettering import Look, sample_look, width
from examples.nano.making.documents.page import MARGIN, Box
from examples.nano.making.documents.sheet import Choices, Sheet
from examples.nano.making.documents.values import SHORTEST, TRIES, DoesNotFit, Value

KINDS = ("code", "price", "time", "place", "number", "percent", "weight", "city", "phone")
LONGEST_LABEL, LONGEST_VALUE = 7, 9  # characters
NARROWEST_COLUMN = 120  # pixels
_GAP = 8  # pixels between two columns, and at least 4 between a label and its value


def register(sheet: Sheet) -> None:
    """As many columns of lines as the page has room for, full from top to bottom."""
    page, draw = sheet.page, sheet.draw
    look = sample_look(draw)
    columns = max(1, page.inner // NARROWEST_COLUMN)
    rows = (page.size - 2 * MARGIN + 2) // look.line_height
    choices = sheet.choose(lambda draw: _layout(draw, columns, rows))
    step = (page.size - 2 * MARGIN + 2) / rows
    room = (page.inner - _GAP * (columns - 1)) / columns
    labels = iter(choices["labels"])
    for row in range(rows):
        y = MARGIN - 2 + row * step
        cells = [_cell(sheet, choices, next(labels), place * (room + _GAP), y, room, look) for place in range(columns)]
        sheet.lines.append(" ".join(cells))
        if choices["rules"]:
            page.rule(y + step - 1)


def _layout(draw: random.Random, columns: int, rows: int) -> Choices:
    words = [word for word in lists.LABELS if len(word) <= LONGEST_LABEL]
    return {
        "labels": draw.sample(words, columns * rows),
        "end": draw.choice(("", ":")),
        "capitals": draw.random() < 0.3,
        "values": draw.choice(("after", "right")),
        "rules": draw.random() < 0.3,
    }


def _cell(sheet: Sheet, choices: Choices, label: str, left: float, y: float, room: float, look: Look) -> str:
    """Write a label and its value into `room` pixels; returns them as text."""
    page = sheet.page
    printed = (label.upper() if choices["capitals"] else label) + choices["end"]
    x = MARGIN + left
    label_box = page.write(printed, x, y, look, room=room, colour=page.muted)
    free = x + room - label_box[2] - 4
    value = _short_value(sheet, free, look)
    box: Box
    if choices["values"] == "right":
        box = page.write(value.text, x + room, y, look, align="right", room=free)
    else:
        box = page.write(value.text, label_box[2] + 4, y, look, room=free)
    sheet.add(label.lower(), printed.removesuffix(":"), value, box, [label.lower()])
    return f"{printed} {value.text}"


def _short_value(sheet: Sheet, room: float, look: Look) -> Value:
    """A value that is at most `room` pixels wide.

    Raises:
        DoesNotFit: none was found.
    """
    for _ in range(TRIES):
        kind = sheet.draw.choice(KINDS)
        value = sheet.values.new(kind, longest=max(LONGEST_VALUE, SHORTEST.get(kind, 2)))
        if width(value.text, look) <= room:
            return value
    raise DoesNotFit
