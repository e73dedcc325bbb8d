"""Make the quickstart's data: little receipts, forms, shipping labels and stock tables, with questions about them.

    python examples/make_quickstart_data.py                 # writes examples/quickstart
    python examples/make_quickstart_data.py --output data   # the same files elsewhere

Written are `images/*.png`, `train.jsonl` and `eval.jsonl` (format `messages`: roles, content, and images beside them),
and `chat.json` (Qwen-VL's own format, with boxes). All of it is drawn from seeds, so it comes out the same each time;
nothing in it is real.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from qwenvl.boxes import box_markup

TRAIN_DOCUMENTS = 11  # of each kind
EVAL_DOCUMENTS = 3

SHOPS = ["Corner Bakery", "Blue Kiosk", "Green Market", "Book Nook", "Cafe Lumen", "Harbour Deli", "Paper & Pen"]
GOODS = [
    "Coffee",
    "Bread",
    "Apples",
    "Milk",
    "Notebook",
    "Tea",
    "Soap",
    "Rice",
    "Candle",
    "Pencils",
    "Honey",
    "Cheese",
]
FIRST_NAMES = ["Ada", "Bruno", "Chen", "Dina", "Elif", "Femi", "Greta", "Hugo", "Ines", "Jonas", "Kofi", "Lena"]
LAST_NAMES = [
    "Adler",
    "Baker",
    "Costa",
    "Dumas",
    "Endo",
    "Fischer",
    "Gupta",
    "Hansen",
    "Ito",
    "Jensen",
    "Kaya",
    "Lund",
]
STREETS = ["Oak Street", "Mill Lane", "Station Road", "Lake View", "High Street", "Garden Way", "Park Avenue"]
CITIES = ["Aarhus", "Bergen", "Cork", "Dresden", "Evora", "Faro", "Graz", "Haarlem", "Ipswich"]
DEPARTMENTS = ["Archive", "Billing", "Design", "Field Work", "Library", "Repairs"]

Box = tuple[int, int, int, int]


@dataclass
class Document:
    """A page and what can be asked about it.

    Attributes:
        name: of its image file.
        image: the page.
        questions: question -> answer.
        boxes: what stands on the page -> where, (x1, y1, x2, y2) in pixels.
    """

    name: str
    image: Image.Image
    questions: dict[str, str]
    boxes: dict[str, Box]

    @property
    def path(self) -> str:
        return f"images/{self.name}.png"


class Page:
    """A blank page to write on."""

    def __init__(self, width: int, height: int, paper: str = "white"):
        self.image = Image.new("RGB", (width, height), paper)
        self.draw = ImageDraw.Draw(self.image)

    def write(self, x: int, y: int, text: str, size: int = 15, anchor: str = "la") -> Box:
        """Write a text and return its box in pixels; `anchor` as in PIL."""
        font = ImageFont.load_default(size=size)
        self.draw.text((x, y), text, fill="#202020", font=font, anchor=anchor)
        x1, y1, x2, y2 = self.draw.textbbox((x, y), text, font=font, anchor=anchor)
        return round(x1), round(y1), round(x2), round(y2)

    def line(self, y: int, x1: int = 16, x2: int | None = None) -> None:
        self.draw.line((x1, y, self.image.width - 16 if x2 is None else x2, y), fill="#808080")


def receipt(draw: random.Random, name: str) -> Document:
    """A shop's receipt: goods, prices, total."""
    page = Page(256, 320)
    shop = draw.choice(SHOPS)
    date = f"{draw.randint(2021, 2025)}-{draw.randint(1, 12):02}-{draw.randint(1, 28):02}"
    shop_box = page.write(128, 16, shop, size=20, anchor="ma")
    page.write(128, 46, date, anchor="ma")
    page.line(74)
    goods = draw.sample(GOODS, draw.randint(3, 5))
    cents = [draw.randrange(90, 1900, 5) for _ in goods]
    y = 86
    for good, price in zip(goods, cents, strict=True):
        page.write(20, y, good)
        page.write(236, y, money(price), anchor="ra")
        y += 26
    page.line(y + 4)
    total = money(sum(cents))
    page.write(20, y + 14, "Total", size=18)
    total_box = page.write(236, y + 14, total, size=18, anchor="ra")
    questions = {
        "What is the total?": total,
        "What is the date?": date,
        "What is the name of the shop?": shop,
        f"What is the price of {goods[0].lower()}?": money(cents[0]),
        "How many items were bought?": str(len(goods)),
    }
    return Document(name, page.image, questions, {"the total": total_box, "the shop's name": shop_box})


def form(draw: random.Random, name: str) -> Document:
    """A registration form: fields and two boxes to tick."""
    page = Page(320, 256, paper="#fbfaf4")
    person = f"{draw.choice(FIRST_NAMES)} {draw.choice(LAST_NAMES)}"
    department, room = draw.choice(DEPARTMENTS), str(draw.randint(101, 499))
    number = f"{draw.choice('ABCDEFGH')}-{draw.randint(1000, 9999)}"
    page.write(16, 14, "Registration", size=20)
    boxes = {}
    for row, (label, value) in enumerate(
        [("Name", person), ("Department", department), ("Room", room), ("Number", number)]
    ):
        y = 54 + 34 * row
        page.write(16, y, f"{label}:")
        boxes[f"the {label.lower()}"] = page.write(120, y, value)
        page.line(y + 22, x1=116)
    member = draw.random() < 0.5
    for x, label, ticked in [(16, "Member", member), (150, "Guest", not member)]:
        page.draw.rectangle((x, 206, x + 16, 222), outline="#202020")
        if ticked:
            page.draw.line((x + 3, 209, x + 13, 219), fill="#202020", width=2)
            page.draw.line((x + 13, 209, x + 3, 219), fill="#202020", width=2)
        page.write(x + 26, 205, label)
    questions = {
        "Who filled in the form?": person,
        "Which department is it?": department,
        "What is the room?": room,
        "What is the number?": number,
        "Which box is ticked?": "Member" if member else "Guest",
    }
    return Document(name, page.image, questions, boxes)


def label(draw: random.Random, name: str) -> Document:
    """A shipping label: address, weight, tracking number and bars."""
    page = Page(288, 240, paper="#f3eee2")
    person = f"{draw.choice(FIRST_NAMES)} {draw.choice(LAST_NAMES)}"
    street = f"{draw.choice(STREETS)} {draw.randint(1, 99)}"
    city, postcode = draw.choice(CITIES), str(draw.randint(10000, 99999))
    weight = f"{draw.randint(1, 19)}.{draw.randint(1, 9)} kg"
    tracking = "".join(draw.choice("0123456789") for _ in range(8))
    page.draw.rectangle((8, 8, 279, 231), outline="#202020", width=2)
    page.write(20, 20, "SHIP TO", size=12)
    page.write(20, 40, person, size=18)
    page.write(20, 66, street)
    city_box = page.write(20, 88, f"{postcode} {city}")
    page.line(116)
    weight_box = page.write(266, 126, weight, size=18, anchor="ra")
    page.write(20, 128, "Weight")
    x = 24
    while x < 256:
        bar = draw.randint(1, 4)
        page.draw.rectangle((x, 160, x + bar - 1, 200), fill="#202020")
        x += bar + draw.randint(2, 4)
    page.write(144, 208, tracking, anchor="ma")
    questions = {
        "Who is the parcel for?": person,
        "Which city does it go to?": city,
        "What is the weight?": weight,
        "What is the tracking number?": tracking,
        "What is the postcode?": postcode,
    }
    return Document(name, page.image, questions, {"the weight": weight_box, "the city": city_box})


def table(draw: random.Random, name: str) -> Document:
    """A stock table: goods with their number and price."""
    page = Page(320, 240)
    goods = draw.sample(GOODS, 4)
    stock = draw.sample(range(2, 90), 4)
    cents = draw.sample(range(95, 1900, 5), 4)
    page.write(16, 12, "Stock", size=20)
    columns = [(16, "la", "Item"), (190, "ra", "In stock"), (304, "ra", "Price")]
    for x, anchor, head in columns:
        page.write(x, 48, head, anchor=anchor)
    page.line(72)
    boxes = {}
    for row in range(4):
        y = 84 + 36 * row
        values = [goods[row], str(stock[row]), money(cents[row])]
        for (x, anchor, head), value in zip(columns, values, strict=True):
            boxes[f"the {head.lower()} of {goods[row].lower()}"] = page.write(x, y, value, anchor=anchor)
        page.line(y + 26)
    questions = {
        f"What is the stock of {goods[1].lower()}?": str(stock[1]),
        f"What is the price of {goods[2].lower()}?": money(cents[2]),
        "Which item has the most in stock?": goods[stock.index(max(stock))],
        "Which item is the cheapest?": goods[cents.index(min(cents))],
        "What is the first item?": goods[0],
    }
    return Document(name, page.image, questions, boxes)


def money(cents: int) -> str:
    return f"${cents / 100:.2f}"


KINDS: list[Callable[[random.Random, str], Document]] = [receipt, form, label, table]


def documents(first: int, count: int) -> list[Document]:
    """`count` documents of each kind, numbered from `first`; a document's seed is its name."""
    made = []
    for number in range(first, first + count):
        for kind in KINDS:
            name = f"{kind.__name__}_{number:03}"
            made.append(kind(random.Random(name), name))
    return made


def rows(made: list[Document], two_images: int, seed: str) -> list[dict]:
    """A row for each document, every fourth with two turns, and rows that compare two receipts."""
    draw = random.Random(seed)
    written = []
    for number, document in enumerate(made):
        chosen = draw.sample(sorted(document.questions), 2 if number % 4 == (number // 4) % 4 else 1)
        messages = []
        for turn, question in enumerate(chosen):
            text = {"type": "text", "text": question}
            messages.append({"role": "user", "content": [{"type": "image"}, text] if turn == 0 else [text]})
            messages.append(answer(document.questions[question]))
        written.append({"messages": messages, "images": [document.path]})
    receipts = [document for document in made if document.name.startswith("receipt")]
    for _ in range(two_images):
        pair = draw.sample(receipts, 2)
        totals = [float(document.questions["What is the total?"].lstrip("$")) for document in pair]
        content = [
            {"type": "image"},
            {"type": "image"},
            {"type": "text", "text": "Which picture has the higher total?"},
        ]
        messages = [{"role": "user", "content": content}, answer(f"Picture {1 if totals[0] > totals[1] else 2}")]
        written.append({"messages": messages, "images": [document.path for document in pair]})
    return written


def answer(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def chat_rows(made: list[Document]) -> list[dict]:
    """A question and a box of some documents, in Qwen-VL's own format."""
    written = []
    for document in made:
        question, reply = next(iter(document.questions.items()))
        what, box = next(iter(document.boxes.items()))
        width, height = document.image.size
        turns = [
            ("user", f"Picture 1: <img>{document.path}</img>\n{question}"),
            ("assistant", reply),
            ("user", f"Frame {what}."),
            ("assistant", box_markup(box, width=width, height=height, label=what)),
        ]
        conversations = [{"from": speaker, "value": value} for speaker, value in turns]
        written.append({"id": document.name, "conversations": conversations})
    return written


def write(output: Path) -> None:
    """Write everything into the folder."""
    train, held_out = documents(1, TRAIN_DOCUMENTS), documents(TRAIN_DOCUMENTS + 1, EVAL_DOCUMENTS)
    (output / "images").mkdir(parents=True, exist_ok=True)
    for document in train + held_out:
        # Sixteen colours hold all there is, antialiasing included, in a few kilobytes.
        small = document.image.quantize(16, dither=Image.Dither.NONE)
        small.save(output / document.path, optimize=True)
    write_lines(output / "train.jsonl", rows(train, two_images=4, seed="train"))
    write_lines(output / "eval.jsonl", rows(held_out, two_images=0, seed="eval"))
    chat = json.dumps(chat_rows(train[:6]), ensure_ascii=False, indent=1)
    (output / "chat.json").write_text(chat + "\n", encoding="utf-8", newline="\n")


def write_lines(path: Path, written: list[dict]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
    path.write_text(lines, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "quickstart", help="folder to write to")
    write(parser.parse_args().output)
