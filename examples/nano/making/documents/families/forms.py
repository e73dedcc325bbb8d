"""Families `form` and `label`: labelled fields in rows, and shipping labels.

A label is always on the line of its value; on cards and boarding passes it may stand above it.
"""

import random
from typing import NamedTuple

from examples.nano.making.documents.lettering import SIZES, Look, sample_look, width
from examples.nano.making.documents.page import MARGIN, Align, Box
from examples.nano.making.documents.sheet import Choices, Sheet


class Entry(NamedTuple):
    """A field that a form may have."""

    kind: str
    labels: tuple[str, ...]
    asks: tuple[str, ...] = ()


ENTRIES = {
    "name": Entry("name", ("Name", "Full name", "Client", "Person"), ("Who filled in the form?", "Who is it?")),
    "date": Entry("date", ("Date", "Day", "Issued"), ("When was it?", "Which day is it?")),
    "city": Entry("city", ("City", "Town", "Place"), ("Which city is it?", "Where is it?")),
    "phone": Entry("phone", ("Phone", "Tel", "Call"), ("Which number can I call?",)),
    "code": Entry("code", ("Code", "Ref", "ID", "Number"), ("Which code does it have?",)),
    "amount": Entry("price", ("Amount", "Fee", "Due", "Sum"), ("How much is it?", "How much is due?")),
    "time": Entry("time", ("Time", "Hour", "Start"), ("At what time is it?", "What time is it?")),
    "rate": Entry("percent", ("Rate", "Share", "Score"), ("What percentage is it?",)),
    "room": Entry("place", ("Room", "Desk", "Unit"), ("Which room is it?",)),
    "count": Entry("number", ("Count", "Pieces", "Units"), ("How many are there?",)),
    "item": Entry("item", ("Item", "Goods", "Product"), ("What is it about?",)),
    "shop": Entry("shop", ("Shop", "Firm"), ("Which firm is it?",)),
}
TITLES = ("FORM", "Order", "Visit", "Member", "Permit", "Report", "Request", "Notice", "Registration", "Invoice")
# How a printed label ends. Dots and lines between label and value are drawn, and are no text.
SEPARATORS = {"colon": ":", "plain": "", "dash": " -", "dots": "", "boxed": "", "underlined": ":", "equals": " ="}


def form(sheet: Sheet) -> None:
    """Three or more labelled fields below one another, with or without a title."""
    page, draw = sheet.page, sheet.draw
    look = sample_look(draw)
    label_look = look if draw.random() < 0.6 else Look(min(SIZES))
    value_look = look.bolder() if draw.random() < 0.25 else look
    line = look.line_height
    most = (page.size - 2 * MARGIN + 2) // (line + 1)
    choices = sheet.choose(lambda draw: _form_layout(draw, most))
    rows, values_at, style = choices["rows"], choices["values"], choices["style"]
    title = choices["title"]
    step = min((page.size - 2 * MARGIN) / (len(rows) + bool(title)), line + draw.uniform(2, 9))
    y = MARGIN - 2 + draw.uniform(0, page.size - 2 * MARGIN - step * (len(rows) + bool(title)))
    if title:
        x = page.anchor(choices["title_at"])
        page.write(title, x, y, look.bolder(), align=choices["title_at"])
        sheet.lines.append(title)
        if choices["rule"] == "title":
            page.rule(y + line)
        y += step
    labels = [_cased(label, choices["case"]) + SEPARATORS[style] for _, label in rows]
    column = MARGIN + max(width(label, label_look) for label in labels) + draw.randint(4, 10)
    colour = page.muted if draw.random() < 0.5 else None
    for (key, _), label in zip(rows, labels, strict=True):
        if values_at == "labels-right":
            label_box = page.write(label, column - 4, y, label_look, align="right", colour=colour)
        else:
            label_box = page.write(label, MARGIN, y, label_look, colour=colour)
        x = {"after": label_box[2] + 6, "right": page.size - MARGIN}.get(values_at, column + 2)
        value = sheet.values.new(ENTRIES[key].kind, longest=15)
        align: Align = "right" if values_at == "right" else "left"
        room = page.size - MARGIN - (label_box[2] + 5 if values_at == "right" else x)
        top = y - (look.size - label_look.size) * 0.75  # label and value share a baseline
        box = page.write(value.text, x, top, value_look, align=align, room=room)
        _connect(sheet, style, label_box, box, y, line)
        if choices["rule"] == "rows":
            page.rule(y + line)
        sheet.lines.append(f"{label} {value.text}")
        printed = label.removesuffix(SEPARATORS[style])
        sheet.add(key, printed, value, box, [printed.lower(), key], ENTRIES[key].asks)
        y += step


def _form_layout(draw: random.Random, most: int) -> Choices:
    title = draw.choice((None, draw.choice(TITLES)))
    rows = draw.randint(min(3, most - bool(title)), min(7, most - bool(title)))
    keys = draw.sample(sorted(ENTRIES), rows)
    return {
        "rows": [(key, draw.choice(ENTRIES[key].labels)) for key in keys],
        "style": draw.choice(list(SEPARATORS)),
        "values": draw.choice(("after", "column", "column", "right", "labels-right")),
        "case": draw.choice(("as-is", "as-is", "upper", "lower")),
        "title": title,
        "title_at": draw.choice(("left", "centre", "right")),
        "rule": draw.choice(("none", "none", "title", "rows")),
    }


def _cased(label: str, case: str) -> str:
    return {"upper": label.upper(), "lower": label.lower()}.get(case, label)


def _connect(sheet: Sheet, style: str, label_box: Box, box: Box, y: float, line: int) -> None:
    """Draw what a style has besides text."""
    page = sheet.page
    if style == "dots" and box[0] - label_box[2] > 8:
        page.rule(y + line - 5, label_box[2] + 3, box[0] - 3, page.muted, dash=1)
    if style == "boxed":
        page.frame((box[0] - 3, y - 1, min(page.size - 2, box[2] + 2), y + line - 1))
    if style == "underlined":
        page.rule(y + line - 1, box[0] - 1, box[2] + 1)


LABEL_ASKS = {
    "from": ("Who sent the parcel?", "Who is the sender?"),
    "to": ("Who is the parcel for?", "Who gets the parcel?"),
    "city": ("Where does the parcel go?", "Which city does it go to?"),
    "weight": ("How heavy is the parcel?", "What does it weigh?"),
    "code": ("What is the tracking code?", "Which code is under the bars?"),
    "date": ("When was it sent?",),
}
LABEL_WORDS = {
    "from": ("From", "Sender"),
    "to": ("To", "Ship to", "Deliver to"),
    "weight": ("Weight", "Wt", "Kilos"),
    "code": ("Code", "Parcel", "Track"),
    "date": ("Sent", "Posted"),
}


def label(sheet: Sheet) -> None:
    """A shipping label: sender, receiver, city, weight, date, a code and bars."""
    page, draw = sheet.page, sheet.draw
    look = sample_look(draw)
    line = look.line_height
    choices = sheet.choose(lambda draw: _label_layout(draw, (page.size - 2 * MARGIN) // (line + 2)))
    if choices["frame"] != "none":
        page.frame((1, 1, page.size - 2, page.size - 2), page.ink, width=2 if choices["frame"] == "thick" else 1)
    bars = draw.randint(14, 22) if choices["bars"] != "none" else 0
    rows = len(choices["rows"]) + ("to" in choices["rows"])  # the city has a line of its own
    step = line + min(draw.uniform(1, 8), (page.size - 2 * MARGIN - bars - rows * line) / rows)
    if step < line:
        bars, step = 0, (page.size - 2 * MARGIN) / rows
    y = MARGIN + draw.uniform(0, max(0.0, page.size - 2 * MARGIN - bars - rows * step)) - 1
    if bars and choices["bars"] == "top":
        y = _bars(sheet, y, bars)
    for key, word in zip(choices["rows"], choices["labels"], strict=True):
        _label_row(sheet, choices, key, word, y, look)
        y += step
        if key == "to":
            inset = {"indent": 14, "left": 0, "right": 0}[choices["city"]]
            city = sheet.values.new("city", longest=13)
            x = page.size - MARGIN - 1 if choices["city"] == "right" else MARGIN + 1 + inset
            box = page.write(city.text, x, y, look, align="right" if choices["city"] == "right" else "left")
            sheet.lines.append(city.text)
            sheet.add("city", "", city, box, ["city", "town"], LABEL_ASKS["city"])
            y += step
        if choices["rules"] == "all" or (choices["rules"] == "to" and key == "to"):
            page.rule(y - 1, colour=page.muted)
    if bars and choices["bars"] == "bottom":
        _bars(sheet, y, bars)


def _label_layout(draw: random.Random, most: int) -> Choices:
    keys = ["to", *draw.sample(["from", "weight", "code", "date"], draw.randint(2, min(4, most - 2)))]
    draw.shuffle(keys)
    return {
        "rows": keys,
        "labels": [draw.choice(LABEL_WORDS[key]) for key in keys],
        "end": draw.choice((":", ":", "", ".")),
        "case": draw.choice(("as-is", "upper")),
        "values": draw.choice(("after", "after", "right")),
        "city": draw.choice(("indent", "left", "right")),
        "bars": draw.choice(("none", "top", "bottom", "bottom")),
        "frame": draw.choice(("none", "thin", "thick")),
        "rules": draw.choice(("none", "to", "all")),
    }


def _label_row(sheet: Sheet, choices: Choices, key: str, word: str, y: float, look: Look) -> None:
    """Write one labelled value."""
    page = sheet.page
    printed = _cased(word, choices["case"])
    kind = {"from": "name", "to": "name"}.get(key, key)
    value = sheet.values.new(kind, longest=14, upper=choices["case"] == "upper" and key == "to")
    label_box = page.write(printed + choices["end"], MARGIN + 1, y, look, colour=page.muted)
    after = choices["values"] == "after"
    x = label_box[2] + 6 if after else page.size - MARGIN - 1
    room = page.size - MARGIN - 1 - label_box[2] - 6
    emphasis = look.bolder() if key == "to" else look
    box = page.write(value.text, x, y, emphasis, align="left" if after else "right", room=room)
    sheet.lines.append(f"{printed}{choices['end']} {value.text}")
    names = {"from": ["sender"], "to": ["receiver"], "date": ["date"], "code": ["tracking code", "code"]}
    sheet.add(key, printed, value, box, names.get(key, [word.lower(), key]), LABEL_ASKS[key])


def _bars(sheet: Sheet, y: float, height: int) -> float:
    """Draw a bar code, which has no content; returns the y where it ends."""
    page, draw = sheet.page, sheet.draw
    x, end = MARGIN + draw.randint(2, 20), page.size - MARGIN - draw.randint(2, 20)
    while x < end:
        bar = draw.randint(1, 3)
        page.frame((x, y + 2, x + bar - 1, y + height - 3), page.ink, fill=page.ink)
        x += bar + draw.randint(1, 3)
    return y + height
