"""A contact sheet: documents of every family with the boxes of their fields, to be looked at."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from examples.nano.making.documents.conversations import kinds_of
from examples.nano.making.documents.document import Document, make_document
from examples.nano.making.documents.write import Plan, conversations_of

SCALE = 2
_GAP = 6  # pixels between two pages
_CAPTION = 16  # pixels
_OUTLINES = ((230, 30, 30), (20, 120, 230))


def contact_sheet(
    families: Sequence[str], per_family: int, *, seed: int, split: str, image_size: int, difficulty: float
) -> Image.Image:
    """A row for each family: every page at twice its size, and below it the same page with its fields' boxes."""
    cell = SCALE * image_size + _GAP
    sheet = Image.new("RGB", (per_family * cell + _GAP, len(families) * (2 * cell + _CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, family in enumerate(families):
        top = row * (2 * cell + _CAPTION)
        caption = f"{family}, {split}, seed {seed}, {image_size} px, difficulty {difficulty:g}"
        pen.text((_GAP, top + 2), caption, fill="black", font=ImageFont.load_default(12))
        for column in range(per_family):
            document = make_document(
                family, seed=seed, split=split, index=column, image_size=image_size, difficulty=difficulty
            )
            x = _GAP + column * cell
            sheet.paste(_enlarged(document), (x, top + _CAPTION))
            sheet.paste(_with_boxes(document), (x, top + _CAPTION + cell))
    return sheet


def _enlarged(document: Document) -> Image.Image:
    return document.image.resize([SCALE * side for side in document.image.size], Image.Resampling.NEAREST)


def _with_boxes(document: Document) -> Image.Image:
    image = _enlarged(document)
    pen = ImageDraw.Draw(image)
    for number, field in enumerate(document.fields):
        x1, y1, x2, y2 = (SCALE * edge for edge in field.box)
        pen.rectangle((x1 - 1, y1 - 1, max(x1, x2), max(y1, y2)), outline=_OUTLINES[number % 2])
    return image


def sample_conversations(families: Sequence[str], kinds: Sequence[str], *, seed: int, split: str) -> str:
    """As text, a conversation of each kind about a document of each family that has it."""
    written = []
    for kind in kinds:
        for family in families:
            if kind not in kinds_of(family):
                continue
            plan = Plan(split=split, families=(family,), kinds=(kind,), count=1, per_image=1, seed=seed)
            said = next(found for index in range(100) for found in conversations_of(plan, index))
            written.append(f"[{kind}, {family}]")
            for message in said.messages:
                text = "".join(part.get("text", "<image> ") for part in message["content"])
                written.append(f"  {message['role']:<10}{text.replace(chr(10), ' / ')}")
    return "\n".join(written)
