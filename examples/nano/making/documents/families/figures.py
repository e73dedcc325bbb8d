"""Families `chart` and `shapes`: bars with names and values, and coloured shapes to ground, count and name."""

import random

from examples.nano.making.documents.lettering import Look, sample_look, width
from examples.nano.making.documents.page import MARGIN, Align, Box, Colour, Page, mixed
from examples.nano.making.documents.sheet import Choices, Fact, Sheet
from examples.nano.making.documents.values import DoesNotFit, Value, known
from examples.nano.making.documents.word_lists import COLOURS, MONTHS, SHAPES

CHART_TITLES = ("Sales", "Visits", "Stock", "Output", "Trips", "Votes", "Rain")


def chart(sheet: Sheet) -> None:
    """A bar chart: vertical bars with names below and values above, or horizontal ones with both beside them."""
    page, draw = sheet.page, sheet.draw
    look = sample_look(draw)
    choices = sheet.choose(lambda draw: _chart_layout(draw, page.size, look.line_height))
    names, values = _bars(sheet, choices)
    top, bottom = MARGIN - 1, page.size - MARGIN
    title = choices["title"]
    if title:
        at = choices["title_at"]
        y = top if choices["title_side"] == "top" else bottom - look.line_height + 1
        x = page.anchor(at)
        page.write(title, x, y, look.bolder(), align=at)
        if choices["title_side"] == "top":
            top += look.line_height + 2
        else:
            bottom -= look.line_height + 2
    draw_bars = _upright_bars if choices["bars"] == "upright" else _lying_bars
    lines, boxes = draw_bars(sheet, choices, look, names, values, top, bottom)
    if title:
        lines = [title, *lines] if choices["title_side"] == "top" else [*lines, title]
    sheet.lines += lines
    for name, value, box in zip(names, values, boxes, strict=True):
        asks = (f"How high is {name.text}?", f"How much has {name.text}?")
        sheet.add("value", name.text, value, box, [f"value of {name.text}"], asks)
    amounts = [known(value.amount) for value in values]
    for word, best in (("highest", max(amounts)), ("lowest", min(amounts))):
        about = (f"Which bar is the {word}?", f"Which has the {word} value?", f"What is the {word}?")
        sheet.facts.append(Fact(about, names[amounts.index(best)].text))
    sheet.facts.append(Fact(("How many bars are there?", "How many bars?"), str(len(names))))


def _chart_layout(draw: random.Random, size: int, line: int) -> Choices:
    upright = draw.random() < 0.5
    title = draw.choice((None, draw.choice(CHART_TITLES)))
    most = max(2, size // 42) if upright else (size - 2 * MARGIN) // (line + 2) - bool(title)
    return {
        "bars": "upright" if upright else "lying",
        "count": draw.randint(2, min(6, most)),
        "named": draw.choice(("item", "city", "month", "name")),
        "values": draw.choice(("number", "percent")),
        "title": title,
        "title_at": draw.choice(("left", "centre", "right")),
        "title_side": draw.choice(("top", "top", "bottom")),
        "value_at": draw.choice(("end", "end", "edge")),
        "colours": draw.choice(("one", "each", "outline")),
        "axis": draw.choice((True, False)),
        "width": draw.choice(("thin", "wide")),
    }


def _bars(sheet: Sheet, choices: Choices) -> tuple[list[Value], list[Value]]:
    """Draw names and values; no two bars are equally high."""
    count, named = choices["count"], choices["named"]
    if named == "month":
        start = sheet.draw.randrange(12)
        names = [Value(MONTHS[(start + place) % 12], "month") for place in range(count)]
    else:
        longest = 6 if choices["bars"] == "upright" else 9
        names = [sheet.values.new(named, longest=longest + (named == "name") * 3) for _ in range(count)]
    longest = 3 if choices["values"] == "number" else 5
    values = [sheet.values.new(choices["values"], longest) for _ in range(count)]
    if len({value.amount for value in values}) < count:
        raise DoesNotFit
    return names, values


def _paint(sheet: Sheet, choices: Choices) -> list[tuple[Colour, Colour]]:
    """(fill, outline) of each bar."""
    page, draw = sheet.page, sheet.draw
    colours = draw.sample(list(COLOURS.values()), choices["count"])
    if choices["colours"] == "one":
        colours = [colours[0]] * choices["count"]
    fills = [mixed(colour, page.paper, 0.2) for colour in colours]
    return [(page.paper if choices["colours"] == "outline" else fill, mixed(fill, page.ink, 0.5)) for fill in fills]


def _upright_bars(
    sheet: Sheet, choices: Choices, look: Look, names: list[Value], values: list[Value], top: int, bottom: int
) -> tuple[list[str], list[Box]]:
    """Draw vertical bars between `top` and `bottom`; returns the lines of text and the boxes of the values."""
    page, line = sheet.page, look.line_height
    floor, ceiling = bottom - line, top + line
    slot = page.inner / len(names)
    half = slot * (0.18 if choices["width"] == "thin" else 0.36)
    highest = max(known(value.amount) for value in values)
    boxes = []
    for place, (name, value, paint) in enumerate(zip(names, values, _paint(sheet, choices), strict=True)):
        middle = MARGIN + slot * (place + 0.5)
        edge = floor - max(2, round((floor - ceiling) * known(value.amount) / highest))
        page.frame((round(middle - half), edge, round(middle + half), floor), paint[1], fill=paint[0])
        at = edge - line if choices["value_at"] == "end" else top
        boxes.append(page.write(value.text, middle, at, look, align="centre", room=slot - 3))
        page.write(name.text, middle, floor + 1, look, align="centre", room=slot - 3)
    if choices["axis"]:
        page.rule(floor, colour=page.ink)
    # Values above bars stand at different heights, but count as one line above the line of names.
    return [" ".join(value.text for value in values), " ".join(name.text for name in names)], boxes


def _lying_bars(
    sheet: Sheet, choices: Choices, look: Look, names: list[Value], values: list[Value], top: int, bottom: int
) -> tuple[list[str], list[Box]]:
    """Draw horizontal bars; arguments and result as for `_upright_bars`."""
    page, line = sheet.page, look.line_height
    start = MARGIN + max(width(name.text, look) for name in names) + 4
    end = page.size - MARGIN - max(width(value.text, look) for value in values) - 4
    if end - start < 16:
        raise DoesNotFit
    step = (bottom - top) / len(names)
    if step < line:
        raise DoesNotFit
    half = line * (0.25 if choices["width"] == "thin" else 0.4)
    highest = max(known(value.amount) for value in values)
    boxes, lines = [], []
    for place, (name, value, paint) in enumerate(zip(names, values, _paint(sheet, choices), strict=True)):
        middle = top + step * (place + 0.5)
        page.write(name.text, MARGIN, middle - line / 2, look)
        edge = start + max(2, round((end - start) * known(value.amount) / highest))
        page.frame((start, round(middle - half), edge, round(middle + half)), paint[1], fill=paint[0])
        at_end = choices["value_at"] == "end"
        x = edge + 4 if at_end else page.size - MARGIN
        align: Align = "left" if at_end else "right"
        boxes.append(page.write(value.text, x, middle - line / 2, look, align=align))
        lines.append(f"{name.text} {value.text}")
    if choices["axis"]:
        page.pen.line((start, top, start, bottom), fill=page.ink)
    return lines, boxes


def shapes(sheet: Sheet) -> None:
    """Two to eight coloured shapes, each in its own cell of a 3 x 3 or 4 x 4 grid."""
    page, draw = sheet.page, sheet.draw
    choices = sheet.choose(_shapes_layout)
    grid = choices["grid"]
    cell = page.inner / grid
    # Colours that show on the paper.
    distinct = sorted(name for name, colour in COLOURS.items() if _distance(colour, page.paper) > 120)
    colours, kinds = draw.sample(distinct, draw.randint(2, 4)), draw.sample(SHAPES, draw.randint(2, 4))
    for at in choices["cells"]:
        radius = draw.uniform(0.26, 0.44) * cell
        x = MARGIN + (at % grid + 0.5) * cell + draw.uniform(-1, 1) * (cell * 0.46 - radius)
        y = MARGIN + (at // grid + 0.5) * cell + draw.uniform(-1, 1) * (cell * 0.46 - radius)
        colour, kind = draw.choice(colours), draw.choice(kinds)
        box = (round(x - radius), round(y - radius), round(x + radius), round(y + radius))
        _draw_shape(page, kind, COLOURS[colour], box)
        edges = (box[0], box[1], box[2] + 1, box[3] + 1)
        sheet.add(kind, colour, Value(f"{colour} {kind}", "shape"), edges)


def _distance(first: Colour, second: Colour) -> int:
    return sum(abs(a - b) for a, b in zip(first, second, strict=True))


def _shapes_layout(draw: random.Random) -> Choices:
    grid = draw.choice((3, 3, 4))
    return {"grid": grid, "cells": sorted(draw.sample(range(grid * grid), draw.randint(2, 8)))}


def _draw_shape(page: Page, kind: str, colour: Colour, box: tuple[int, int, int, int]) -> None:
    """Draw a shape that touches all four sides of its box, with an outline."""
    pen, (x1, y1, x2, y2), edge = page.pen, box, mixed(colour, page.ink, 0.6)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    third = (x2 - x1) / 3
    match kind:
        case "circle":
            pen.ellipse(box, fill=colour, outline=edge)
        case "square":
            pen.rectangle(box, fill=colour, outline=edge)
        case "triangle":
            pen.polygon([(x, y1), (x2, y2), (x1, y2)], fill=colour, outline=edge)
        case "diamond":
            pen.polygon([(x, y1), (x2, y), (x, y2), (x1, y)], fill=colour, outline=edge)
        case "ring":
            pen.ellipse(box, outline=colour, width=max(3, round(third * 0.7)))
        case "cross":
            xs, ys = (x1, x1 + third, x2 - third, x2), (y1, y1 + third, y2 - third, y2)
            corners = [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]
            pen.polygon([(xs[a], ys[b]) for a, b in corners], fill=colour, outline=edge)
