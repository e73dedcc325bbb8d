"""Families `receipt` and `table`: goods with prices and a total, and rows and columns below a header."""

import random

from examples.nano.making.documents.lettering import Look, sample_look, width
from examples.nano.making.documents.page import MARGIN, Align, Box, Colour
from examples.nano.making.documents.sheet import Choices, Fact, Sheet
from examples.nano.making.documents.values import DoesNotFit, Value, known

TOTALS = ("Total", "TOTAL", "Sum", "To pay", "Total:", "Amount due")
THANKS = ("Thank you!", "Come again!", "Goodbye", "Have a nice day")
PAYMENTS = ("Cash", "Card", "Voucher")


def receipt(sheet: Sheet) -> None:
    """A shop's receipt: its name, a date, sometimes the hour, goods with prices, the total."""
    page, draw = sheet.page, sheet.draw
    look = sample_look(draw)
    line = look.line_height
    most = (page.size - 2 * MARGIN + 2) // line
    choices = sheet.choose(lambda draw: _receipt_layout(draw, most))
    rows = 3 + choices["goods"] + sum(choices[extra] for extra in ("hour", "thanks", "payment"))
    step = min((page.size - 2 * MARGIN + 2) / rows, line + draw.uniform(0, 5))
    y = MARGIN - 2 + draw.uniform(0, max(0.0, page.size - 2 * MARGIN - step * rows))
    prices, total = sheet.values.bill(choices["goods"], highest=draw.choice((1000, 4000)))
    right = page.size - MARGIN - draw.randint(0, 4)

    def alone(text: str, emphasis: Look = look) -> Box:
        """Write a line that has no label, and move to the next."""
        nonlocal y
        x = {"left": MARGIN, "centre": page.size / 2, "right": right}[choices["head"]]
        box = page.write(text, x, y, emphasis, align=choices["head"])
        sheet.lines.append(text)
        y += step
        return box

    def dated() -> None:
        """Write the date, and the hour if the layout has one."""
        date = sheet.values.new("date", longest=12)
        sheet.add("date", "", date, alone(date.text), ["date"], ("When was it bought?", "Which day was it?"))
        if choices["hour"]:
            hour = sheet.values.new("time")
            sheet.add("time", "", hour, alone(hour.text), ["time"], ("At what time was it bought?",))

    shop = sheet.values.new("shop")
    box = alone(shop.text, look.bolder())
    sheet.add("shop", "", shop, box, ["shop", "name of the shop"], ("Where was it bought?", "Which shop is it?"))
    if choices["date"] == "top":
        dated()
    if choices["rule"] != "none":
        page.rule(y - 1, colour=page.muted, dash=2 if choices["rule"] == "dashed" else 0)
    goods = []
    for price in prices:
        item = sheet.values.new("item", longest=10)
        goods.append(item)
        item_box, price_box = _item_row(sheet, choices, item, price, y, right, look)
        sheet.add("item", "", item, item_box)
        name = item.text
        asks = (f"How much is {name}?", f"What does {name} cost?")
        sheet.add("price", name, price, price_box, [f"price of {name}"], asks)
        y += step
    if choices["rule"] != "none":
        page.rule(y, colour=page.muted, dash=2 if choices["rule"] == "dashed" else 0)
    bold = look.bolder() if choices["total_bold"] else look
    label = choices["total"]
    label_box = page.write(label, MARGIN, y + 1, bold)
    box = page.write(total.text, right, y + 1, bold, align="right", room=right - label_box[2] - 4)
    sheet.lines.append(f"{label} {total.text}")
    sheet.add("total", label, total, box, ["total", "sum"], ("How much is it in all?", "How much was paid?"))
    y += step + 1
    if choices["payment"]:
        paid = Value(draw.choice(PAYMENTS), "payment")
        sheet.add("payment", "", paid, alone(paid.text), ["payment"], ("How was it paid?",))
    if choices["date"] == "bottom":
        dated()
    if choices["thanks"]:
        alone(draw.choice(THANKS))
    _receipt_facts(sheet, goods, prices)


def _receipt_layout(draw: random.Random, most: int) -> Choices:
    goods = draw.randint(2, max(2, min(5, most - 4)))
    extras = [False, False, False]
    spare = most - 3 - goods
    for place in draw.sample(range(3), 3):
        extras[place] = spare > 0 and draw.random() < 0.4
        spare -= extras[place]
    return {
        "goods": goods,
        "head": draw.choice(("left", "centre", "centre", "right")),
        "date": draw.choice(("top", "top", "bottom")),
        "rule": draw.choice(("none", "solid", "dashed")),
        "prices": draw.choice(("right", "right", "dots", "colon", "numbered", "first")),
        "total": draw.choice(TOTALS),
        "total_bold": draw.random() < 0.5,
        **dict(zip(("hour", "thanks", "payment"), extras, strict=True)),
    }


def _item_row(
    sheet: Sheet, choices: Choices, item: Value, price: Value, y: float, right: int, look: Look
) -> tuple[Box, Box]:
    """Write an item and its price; returns their boxes."""
    page, style = sheet.page, choices["prices"]
    if style == "first":
        price_box = page.write(price.text, MARGIN, y, look)
        item_box = page.write(item.text, right, y, look, align="right", room=right - price_box[2] - 4)
        sheet.lines.append(f"{price.text} {item.text}")
        return item_box, price_box
    before = f"{sum(field.key == 'price' for field in sheet.fields) + 1}. " if style == "numbered" else ""
    end = ":" if style == "colon" else ""
    x = float(MARGIN)
    if before:
        x += width(before.rstrip(), look) + 3
        page.write(before.rstrip(), MARGIN, y, look, colour=page.muted)
    item_box = page.write(item.text + end, x, y, look)
    price_box = page.write(price.text, right, y, look, align="right", room=right - item_box[2] - 4)
    if style == "dots" and price_box[0] - item_box[2] > 8:
        page.rule(y + look.line_height - 5, item_box[2] + 3, price_box[0] - 3, page.muted, dash=1)
    sheet.lines.append(f"{before}{item.text}{end} {price.text}")
    return item_box, price_box


def _receipt_facts(sheet: Sheet, goods: list[Value], prices: list[Value]) -> None:
    amounts = [known(price.amount) for price in prices]
    dear, cheap = amounts.index(max(amounts)), amounts.index(min(amounts))
    if amounts[dear] > amounts[cheap]:
        sheet.facts.append(Fact(("What is the dearest item?", "Which item costs the most?"), goods[dear].text))
        sheet.facts.append(Fact(("What is the cheapest item?", "Which item costs the least?"), goods[cheap].text))
    sheet.facts.append(Fact(("How many items were bought?", "How many items are there?"), str(len(goods))))


FIRST_COLUMNS = {"item": ("Item", "Goods"), "city": ("City", "Town"), "name": ("Name", "Who")}
COLUMNS = {
    "number": ("Qty", "Stock", "Units"),
    "price": ("Price", "Cost"),
    "percent": ("Share", "Rate"),
    "time": ("Time", "Hour"),
    "place": ("Room", "Desk"),
    "weight": ("Mass", "Load"),
}
TABLE_TITLES = ("Stock", "List", "Plan", "Offer", "Week", "Results")


def table(sheet: Sheet) -> None:
    """Two to four columns below a header, two to six rows; the first column has the rows' names."""
    page, draw = sheet.page, sheet.draw
    look = sample_look(draw)
    line = look.line_height
    most = (page.size - 2 * MARGIN + 2) // (line + 1)
    choices = sheet.choose(lambda draw: _table_layout(draw, most, page.inner))
    kinds, heads = choices["kinds"], choices["heads"]
    # The more columns, the shorter the cells.
    longest = {2: 10, 3: 7, 4: 6}[len(kinds)] + (page.size - 140) // 30
    cells = [[sheet.values.new(kind, longest=longest) for kind in kinds] for _ in range(choices["rows"])]
    rights = _column_ends(sheet, [heads, *[[cell.text for cell in row] for row in cells]], look)
    lefts = [MARGIN, *[right + 5 for right in rights[:-1]]]
    rows = choices["rows"] + 1 + bool(choices["title"])
    step = min((page.size - 2 * MARGIN + 2) / rows, line + draw.uniform(1, 8))
    y = MARGIN - 2 + draw.uniform(0, max(0.0, page.size - 2 * MARGIN - step * rows))

    def across(texts: list[str], emphasis: Look, colour: Colour | None = None) -> list[Box]:
        """Write a row of cells."""
        boxes = []
        for place, text in enumerate(texts):
            align: Align = "left" if place == 0 else choices["align"]
            x = {"left": lefts[place], "right": rights[place], "centre": (lefts[place] + rights[place]) / 2}[align]
            boxes.append(page.write(text, x, y, emphasis, align=align, colour=colour))
        sheet.lines.append(" ".join(texts))
        return boxes

    if choices["title"]:
        page.write(choices["title"], page.size / 2, y, look.bolder(), align="centre")
        sheet.lines.append(choices["title"])
        y += step
    top = y
    across(heads, look.bolder() if choices["head"] == "bold" else look, page.muted)
    if choices["rules"] != "none":
        page.rule(y + line - 1, colour=page.muted)
    y += step
    for number, row in enumerate(cells):
        for place, (cell, box) in enumerate(zip(row, across([cell.text for cell in row], look), strict=True)):
            _note_cell(sheet, heads, kinds, row[0].text, number, place, cell, box)
        if choices["rules"] in ("rows", "grid"):
            page.rule(y + line - 1)
        y += step
    if choices["rules"] == "grid":
        for right in rights[:-1]:
            page.pen.line((right + 2, top, right + 2, y - step + line), fill=page.faint)
    _table_facts(sheet, heads, cells)


def _table_layout(draw: random.Random, most: int, inner: int) -> Choices:
    columns = draw.choice((2, 2, 3, 3, 4)) if inner >= 130 else draw.choice((2, 2, 3))
    first = draw.choice(sorted(FIRST_COLUMNS))
    kinds = [first, *draw.sample(sorted(COLUMNS), columns - 1)]
    title = draw.choice((None, None, draw.choice(TABLE_TITLES)))
    names = FIRST_COLUMNS | COLUMNS
    return {
        "kinds": kinds,
        "heads": [draw.choice(names[kind]) for kind in kinds],
        "rows": draw.randint(2, max(2, min(6, most - 1 - bool(title)))),
        "align": draw.choice(("left", "right", "right", "centre")),
        "title": title,
        "head": draw.choice(("bold", "plain")),
        "rules": draw.choice(("none", "head", "rows", "grid")),
    }


def _column_ends(sheet: Sheet, rows: list[list[str]], look: Look) -> list[float]:
    """The right edges of the columns; part of the free width is shared among the gaps."""
    needed = [max(width(row[place], look) for row in rows) + 3 for place in range(len(rows[0]))]
    gap = 5
    spare: float = sheet.page.inner - sum(needed) - gap * (len(needed) - 1)
    if spare < 0:
        raise DoesNotFit
    spare *= sheet.draw.uniform(0.2, 1.0)
    ends, x = [], float(MARGIN)
    for place, wide in enumerate(needed):
        x += wide + (gap if place else 0) + (spare / (len(needed) - 1) if place else 0)
        ends.append(x)
    return ends


def _note_cell(
    sheet: Sheet, heads: list[str], kinds: list[str], row: str, number: int, place: int, cell: Value, box: Box
) -> None:
    """Record the cell in column `place` of the row with this name and number."""
    head = heads[place].lower()
    if place == 0:
        ordinal = ("first", "second", "third", "fourth", "fifth", "sixth")[number]
        sheet.add(kinds[0], heads[0], cell, box, [f"{ordinal} {'entry' if head == 'who' else head}"])
    else:
        sheet.add(kinds[place], heads[place], cell, box, [f"{head} of {row}"], (f"Which {head} does {row} have?",))


def _table_facts(sheet: Sheet, heads: list[str], cells: list[list[Value]]) -> None:
    sheet.facts.append(Fact(("How many rows are there?", "How many rows does the table have?"), str(len(cells))))
    for place in range(1, len(heads)):
        amounts = [amount for row in cells if (amount := row[place].amount) is not None]
        if len(amounts) < len(cells):  # a kind that cannot be compared
            continue
        head = heads[place].lower()
        for word, best in (("highest", max(amounts)), ("lowest", min(amounts))):
            if amounts.count(best) == 1:
                answer = cells[amounts.index(best)][0].text
                sheet.facts.append(Fact((f"Which has the {word} {head}?", f"Who has the {word} {head}?"), answer))
