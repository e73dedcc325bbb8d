"""Data files of every kind with something wrong in them: read exactly as they were written, or refused in a sentence.

What a change leaves readable depends on the kind. A packed file, a workbook or a mark between fields cannot be read
as something else; in a plain text file, a changed letter is another letter.
"""

import gzip
import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import openpyxl
from PIL import Image

from finetune.data.sample import BadRow
from finetune.data.samples import Samples
from finetune.errors import InputError
from finetune.recipe.sources import Source

ROWS = [
    {"image": "a.png", "question": "What is the total?", "answers": "$ 12.40"},
    {"image": "a.png", "question": "\u7ea2\u8272\u7684\u662f\u4ec0\u4e48\uff1f", "answers": "\u65b9\u5757; red"},
    {"image": "a.png", "question": "Date, please?", "answers": "007"},
    {"image": "a.png", "question": "Paid?\nSay it | so.", "answers": "yes\tno"},
]
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030", "big5", "utf-16-be", "utf-16-le")


def jsonl() -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def delimited(mark: str) -> str:
    lines = [list(ROWS[0]), *([f'"{value}"' for value in row.values()] for row in ROWS)]
    return "\n".join(mark.join(line) for line in lines) + "\n"


def workbook() -> bytes:
    book = openpyxl.Workbook()
    for row in [list(ROWS[0]), *(list(row.values()) for row in ROWS)]:
        book.active.append(row)
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


def parquet() -> bytes:
    file = io.BytesIO()
    datasets.Dataset.from_list(ROWS).to_parquet(file)
    return file.getvalue()


def tar() -> bytes:
    file, image = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(image, "PNG")
    with tarfile.open(fileobj=file, mode="w") as packed:
        for number, row in enumerate(ROWS):
            told = json.dumps({key: row[key] for key in ("question", "answers")}).encode()
            for ending, data in (("png", image.getvalue()), ("json", told)):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(data)
                packed.addfile(member, io.BytesIO(data))
    return file.getvalue()


FILES: dict[str, tuple[Callable[[], bytes], bool]] = {
    "rows.jsonl": (lambda: jsonl().encode(), False),
    "rows.json": (lambda: json.dumps(ROWS, ensure_ascii=False).encode(), False),
    "rows.csv": (lambda: delimited(",").encode(), False),
    "rows.jsonl.gz": (lambda: gzip.compress(jsonl().encode()), True),
    "rows.csv.gz": (lambda: gzip.compress(delimited(";").encode()), True),
    "rows.xlsx": (workbook, True),
    "rows.parquet": (parquet, False),
    "rows.tar": (tar, False),
}
"""Name -> what is in it, and whether a change of its bytes is known by its sums."""


def damaged(draw: random.Random, data: bytes) -> bytes:
    """The file cut off, with a few bytes changed, taken out or put in, or something behind it."""
    place = draw.randrange(len(data))
    match draw.randrange(5):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + data[place + draw.randint(1, 40) :]
        case 2:
            return data[:place] + draw.randbytes(draw.randint(1, 40)) + data[place:]
        case 3:
            return data + draw.randbytes(draw.randint(1, 600))
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def read(path: Path | str, **settings: Any) -> tuple[str, list[tuple[str, str]]]:
    """The fate of a file, and the questions and replies that were read of it.

    Raises:
        AssertionError: an error that is no sentence for the user, or without the file and the field.
    """
    found, fate = [], "read"
    try:
        samples = Samples([Source.model_construct(path=str(path), format="vqa", **settings)])
        for outcome in samples.scan(0, len(samples)):
            if isinstance(outcome, BadRow):
                fate = "bad rows"
                assert outcome.origin.row >= 1 and outcome.field and outcome.reason and len(str(outcome)) < 1500, (
                    outcome
                )
                continue
            user, assistant = outcome.messages
            found.append((user["content"][1]["text"], assistant["content"]))
    except InputError as error:
        assert str(error).strip() and len(str(error)) < 3000, error
        assert "rows" in str(error), error
        return "refused", []
    return fate, found


def check_damaged_files(folder: Path, name: str, count: int, seed: int) -> Counter[str]:
    """How many damaged files were refused, had bad rows, or were read.

    Raises:
        AssertionError: as `read`; or a file that knows its damage by sums was read as something else.
    """
    draw = random.Random(f"{seed} {name}")
    make, has_sums = FILES[name]
    data = make()
    written = [(row["question"], row["answers"]) for row in ROWS]
    fates: Counter[str] = Counter()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    for number in range(count):
        path = folder / f"{number}{name}"
        path.write_bytes(damaged(draw, data) if number else data)
        fate, found = read(path)
        assert found == written if not number else fate != "read" or not has_sums or found == written, (number, found)
        fates[fate] += 1
        path.unlink()
    return fates


def check_encodings(folder: Path, count: int, seed: int) -> Counter[str]:
    """How many text files in some encoding, marked or not, with some mark between fields, were read; of those whose
    encoding and mark are not named, all that are read are read exactly.

    Raises:
        AssertionError: as `read`, or rows that are not those that were written.
    """
    draw = random.Random(f"{seed} encodings")
    fates: Counter[str] = Counter()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    written = [(row["question"], row["answers"]) for row in ROWS]
    for number in range(count):
        mark, encoding = draw.choice([",", ";", "\t", "|"]), draw.choice(ENCODINGS)
        kind = draw.choice(["csv", "tsv", "txt", "jsonl"])
        text = jsonl() if kind == "jsonl" else delimited(mark)
        packed = draw.random() < 0.3
        path = folder / f"rows{number}.{kind}{'.gz' if packed else ''}"
        data = text.encode(encoding, errors="replace")
        path.write_bytes(gzip.compress(data) if packed else data)
        settings = {}
        if draw.random() < 0.4:
            settings["encoding"] = encoding
        if kind != "jsonl" and draw.random() < 0.4:
            settings["delimiter"] = mark
        fate, found = read(path, **settings)
        exact = encoding != "big5"  # which has not all of the characters
        assert fate == "refused" or not exact or found == written, (encoding, kind, mark, settings, fate, found)
        assert fate != "refused" or settings.keys() != {"encoding", "delimiter"}, (encoding, kind, mark, settings)
        fates[fate] += 1
        path.unlink()
    return fates
