"""Family `boarding`, held out of training: boarding passes.

Values are of the same kinds as elsewhere. No other family has its labels, its questions or its dark band with light
writing. Labels above their values, in two columns, are on cards too.
"""

import random
from typing import NamedTuple

from examples.nano.making.documents.lettering import SIZES, Look, sample_look
from examples.nano.making.documents.page import MARGIN, mixed
from examples.nano.making.documents.sheet import Choices, Sheet


class Cell(NamedTuple):
    """A label and its value on a boarding pass."""

    kind: str
    labels: tuple[str, ...]
    name: str
    asks: tuple[str, ...]


CELLS = {
    "passenger": Cell(
        "name",
        ("PASSENGER", "TRAVELLER", "FLYER"),
        "passenger",
        ("Who is flying?", "Name the passenger.", "Whose boarding pass is it?", "passenger?"),
    ),
    "flight": Cell(
        "code",
        ("FLIGHT", "FLIGHT NO"),
        "flight",
        ("Which flight is it?", "Name the flight.", "What is the flight number?", "flight?"),
    ),
    "gate": Cell(
        "place", ("GATE",), "gate", ("Which gate should I go to?", "Name the gate.", "Where do I board?", "gate?")
    ),
    "seat": Cell("place", ("SEAT",), "seat", ("Which seat is it?", "Name the seat.", "Where do I sit?", "seat?")),
    "origin": Cell(
        "city",
        ("ORIGIN", "LEAVING"),
        "origin",
        ("Where does the flight start?", "Name the origin.", "Which airport does it leave?", "origin?"),
    ),
    "destination": Cell(
        "city",
        ("DEST.", "BOUND FOR"),
        "destination",
        ("Where does the flight land?", "Name the destination.", "Where am I flying to?", "destination?"),
    ),
    "departure": Cell(
        "date",
        ("DEPARTS", "FLIES ON"),
        "departure",
        ("On which day do I fly?", "Name the day of departure.", "departure?"),
    ),
    "boarding": Cell(
        "time",
        ("BOARDS", "BOARDING"),
        "boarding time",
        ("When does boarding begin?", "Name the boarding time.", "When must I be at the gate?", "boarding time?"),
    ),
    "bags": Cell(
        "weight",
        ("BAGS", "LUGGAGE"),
        "luggage",
        ("How heavy are the bags?", "Name the weight of the luggage.", "luggage?"),
    ),
}
AIRLINES = ("AIR", "WINGS", "JET", "SKY")


def boarding(sheet: Sheet) -> None:
    """A band with the airline, then rows of two cells; the passenger may have a row of their own."""
    page, draw = sheet.page, sheet.draw
    look = sample_look(draw)
    small = Look(min(SIZES))
    band = look.line_height + 4
    row_height = small.line_height + look.line_height - 2
    most = (page.size - band - MARGIN) // row_height
    choices = sheet.choose(lambda draw: _layout(draw, most))
    city = sheet.values.new("city", longest=9)
    # The band has the ink's colour or a tint of it; on dark paper it is light, and the tint is weak.
    tint = draw.choice(((20, 40, 120), (130, 20, 30), (10, 90, 60), page.ink))
    dark = mixed(page.ink, tint, 0.6 if sum(page.ink) < sum(page.paper) else 0.15)
    page.frame((0, 0, page.size, band), dark, fill=dark)
    title = f"{city.text.upper()} {choices['airline']}"
    x = page.anchor(choices["head"])
    page.write(title, x, 2, look.bolder(), align=choices["head"], colour=page.paper)
    sheet.lines.append(title)
    rows = choices["rows"]
    step: float = row_height + min(5.0, (page.size - band - MARGIN - len(rows) * row_height) / len(rows))
    split = MARGIN + page.inner * choices["split"] / 100
    y: float = band + 2
    for row in rows:
        _row(sheet, choices, row, y, [MARGIN, split], (small, look))
        y += step
        if choices["rules"] == "rows" and row is not rows[-1]:
            page.rule(y - 2)
        if choices["rules"] == "columns" and "/" in row:
            page.pen.line((split - 4, y - step + 2, split - 4, y - 2), fill=page.faint)


def _layout(draw: random.Random, most: int) -> Choices:
    keys = draw.sample(sorted(CELLS), len(CELLS))
    alone = draw.random() < 0.5
    if alone:
        keys.remove("passenger")
    pairs = draw.randint(2, min(4, most)) - alone
    rows = [keys[2 * place : 2 * place + 2] for place in range(pairs)]
    if alone:
        rows.insert(draw.choice((0, pairs)), ["passenger"])
    return {
        "rows": ["/".join(row) for row in rows],
        "labels": [draw.choice(CELLS[key].labels) for row in rows for key in row],
        "head": draw.choice(("left", "centre", "right")),
        "airline": draw.choice(AIRLINES),
        "split": draw.choice((50, 55, 60)),
        "rules": draw.choice(("none", "rows", "columns")),
        "capitals": draw.choice((True, False)),
    }


def _row(sheet: Sheet, choices: Choices, row: str, y: float, lefts: list[float], looks: tuple[Look, Look]) -> None:
    """Write one or two cells: their labels are a line of the page, and the values below them the next."""
    page, (small, look) = sheet.page, looks
    keys = row.split("/")
    written = len(sheet.fields)
    labels, texts = [], []
    for place, (key, x) in enumerate(zip(keys, lefts, strict=False)):
        cell = CELLS[key]
        end = lefts[1] - 6 if place == 0 and len(keys) == 2 else page.size - MARGIN
        label = choices["labels"][written + place]
        page.write(label, x, y, small, room=end - x, colour=page.muted)
        value = sheet.values.new(cell.kind, longest=16 if len(keys) == 1 else 11, upper=choices["capitals"])
        box = page.write(value.text, x, y + small.line_height - 2, look, room=end - x)
        sheet.add(key, label, value, box, [cell.name], cell.asks)
        labels.append(label)
        texts.append(value.text)
    sheet.lines += [" ".join(labels), " ".join(texts)]
