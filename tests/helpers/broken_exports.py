"""Annotation exports with something wrong in them: read with what is wrong reported, or refused in a sentence."""

import json
import random
from collections import Counter
from pathlib import Path

from broken_rows import damage
from exports_for_tests import COCO, CVAT, LABEL_STUDIO, LABELME, QUESTIONS, VIA, YOLO, samples_of, write_export

from finetune.data.sample import BadRow
from finetune.errors import InputError
from qwenvl.text.grounding import parse_grounding

JSON = {"coco": COCO, "label_studio": LABEL_STUDIO, "labelme": LABELME, "via": VIA}
TEXT = {"cvat": CVAT, "yolo": YOLO}
INSERTED = [
    *(
        "<",
        ">",
        "&",
        "&b;",
        '"',
        "\0",
        "<!DOCTYPE a>",
        "<!ENTITY b 'c'>",
        "<track/>",
        "</image>",
        "<box/>",
        "<a>" * 50,
    ),
    *("-", "e400", "nan", "inf", "0 ", "1e9", "\n", "\ud800", "9" * 5000, ".5", " 0.5 0.5", "car", "é", "\ufeff"),
]
"""What is put into an export that is text."""


def broken(draw: random.Random, layout: str) -> bytes:
    """The main file of an export with something wrong in it."""
    if layout in JSON:
        document = JSON[layout]
        for _ in range(draw.randint(1, 3)):
            document = damage(draw, document)
        data = json.dumps(document, ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass")
        shape = draw.random()
        if shape < 0.08:
            return data[: draw.randrange(len(data))]
        if shape < 0.16:
            return flipped(draw, data)
        return data
    text = TEXT[layout]
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(text) + 1)
        change = draw.random()
        if change < 0.5:
            text = text[:place] + draw.choice(INSERTED) + text[place:]
        elif change < 0.8:
            text = text[:place] + text[place + draw.randint(1, 12) :]
        else:
            text = text[:place] + text[max(place - 40, 0) : place] + text[place:]
    data = text.encode(errors="surrogatepass")
    return flipped(draw, data) if data and draw.random() < 0.1 else data


def flipped(draw: random.Random, data: bytes) -> bytes:
    """The data with a bit changed; itself where there is none."""
    changed = bytearray(data)
    if changed:
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def check_broken_exports(folder: Path, layout: str, count: int, seed: int) -> Counter[str]:
    """How many exports were refused whole, had bad rows, or were read.

    Raises:
        AssertionError: an error that is no sentence for the user, or a box in a reply that is none.
    """
    draw = random.Random(f"{seed} {layout}")
    path = write_export(folder, layout)
    main = {"labelme": path / "a.json", "yolo": path / "labels" / "a.txt"}.get(layout, path)
    (folder / "outside.png").symlink_to("/etc/hostname")
    fates: Counter[str] = Counter()
    for _ in range(count):
        main.write_bytes(broken(draw, layout))
        given = {"unlabelled": draw.choice(["skip", "keep"]), "rotated": draw.choice(["error", "bounds"])}
        if draw.random() < 0.3:
            given |= {"rows": "image", "prompt": "Find all."}
        if layout == "label_studio" and draw.random() < 0.4:
            given = {"format": "vqa", "questions": QUESTIONS}
        try:
            samples = samples_of(path, layout, **given)
            fate = "read"
            for index in range(len(samples)):
                try:
                    reply = samples[index].messages[1]["content"]
                except BadRow as error:
                    assert error.field and error.reason and len(str(error)) < 1500, error
                    fate = "bad rows"
                    continue
                if given.get("format") != "vqa":
                    assert not parse_grounding(reply).problems, reply
        except InputError as error:
            assert str(error).strip() and len(str(error)) < 1500
            fate = "refused"
        fates[fate] += 1
    return fates
