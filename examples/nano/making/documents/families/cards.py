"""Family `card`: a few values below or beside their labels, in one column or two.

Labels are arbitrary words, half of them made up, and do not tell the kind of the value: to answer a question, the
label has to be found.
"""

import random
from collections.abc import Callable

from examples.nano.making.documents import word_lists as lists
from examples.nano.making.documents.lettering import SIZES, Look, sample_look, width
from examples.nano.making.documents.page import MARGIN
from examples.nano.making.documents.sheet import Choices, Sheet

KINDS = (
    *("name", "date", "city", "phone", "code", "price", "time", "percent"),
    *("place", "number", "item", "shop", "weight", "word"),
)
TITLES = ("CARD", "Record", "File", "Pass", "Ticket", "Badge", "Slip", "Entry", "Details", "Summary")
CASES: dict[str, Callable[[str], str]] = {"as-is": str, "upper": str.upper, "lower": str.lower}


def card(sheet: Sheet) -> None:
    """Rows of one or two cells, each a label and its value; with or without a title."""
    page, draw = sheet.page, sheet.draw
    look = sample_look(draw)
    small = look if draw.random() < 0.4 else Look(min(SIZES))
    below = small.line_height - 2
    choices = sheet.choose(lambda draw: _layout(draw, (page.size - 2 * MARGIN + 2) // (below + look.line_height)))
    row_height = look.line_height + (below if choices["values"] == "below" else 1)
    rows, title = choices["rows"], choices["title"]
    height = len(rows) * row_height + (look.line_height if title else 0)
    spare = max(0.0, page.size - 2 * MARGIN + 2 - height)
    gap = min(draw.uniform(0, 5), spare / len(rows))
    y = MARGIN - 2 + draw.uniform(0, spare - gap * len(rows))
    if title:
        x = page.anchor(choices["title_at"])
        page.write(title, x, y, look.bolder(), align=choices["title_at"])
        sheet.lines.append(title)
        y += look.line_height
    labels = iter([CASES[choices["case"]](label or sheet.values.new("word", 8).text) for label in choices["labels"]])
    lefts = [MARGIN, MARGIN + page.inner * choices["split"] / 100]
    for cells in rows:
        _row(sheet, choices, [next(labels) for _ in range(cells)], y, lefts, (small, look))
        y += row_height + gap
        if choices["rules"]:
            page.rule(y - 2)


def _layout(draw: random.Random, most: int) -> Choices:
    values = draw.choice(("below", "below", "below", "beside"))
    title = draw.choice((None, None, None, draw.choice(TITLES)))
    columns = draw.choice((1, 2, 2)) if values == "below" else 1
    rows = [draw.choice((1, 2, 2, 2, 2)) if columns == 2 else 1 for _ in range(draw.randint(2, max(2, most)))]
    if values == "beside":
        rows += [1] * draw.randint(0, 2)
    known = draw.random() < 0.5
    labels = draw.sample(lists.LABELS, sum(rows)) if known else [""] * sum(rows)
    return {
        "values": values,
        "rows": rows,
        "labels": labels,
        "case": draw.choice(("as-is", "as-is", "upper", "upper", "lower")),
        "end": draw.choice(("", "", "", ":")),
        "capitals": draw.random() < 0.4,
        "title": title,
        "title_at": draw.choice(("left", "centre", "right")),
        "split": draw.choice((45, 50, 55, 60)),
        "rules": draw.random() < 0.3,
    }


def _row(
    sheet: Sheet, choices: Choices, labels: list[str], y: float, lefts: list[float], looks: tuple[Look, Look]
) -> None:
    """Write one or two cells: labels are a line of the page and the values below them the next, or all is one line."""
    page, (small, look) = sheet.page, looks
    is_below = choices["values"] == "below"
    texts = []
    for place, (label, x) in enumerate(zip(labels, lefts, strict=False)):
        end = lefts[1] - 6 if place == 0 and len(labels) == 2 else page.size - MARGIN
        printed = label + choices["end"]
        page.write(printed, x, y, small, room=end - x, colour=page.muted)
        at = (x, y + small.line_height - 2) if is_below else (x + width(printed, small) + 6, y)
        kind = sheet.draw.choice(KINDS)
        value = sheet.values.new(kind, longest=16 if len(labels) == 1 else 11, upper=choices["capitals"])
        box = page.write(value.text, *at, look, room=end - at[0])
        sheet.add(label.casefold(), label, value, box, [label.lower()])
        texts.append((printed, value.text))
    written = zip(*texts, strict=True) if is_below else texts
    sheet.lines += [" ".join(line) for line in written]
