"""Sets of documents on disk in the format `messages`, made by several processes.

    DIR/train.jsonl, DIR/images/train/000000.png, ...     jsonl: images beside the rows; for small sets
    DIR/train/00000.parquet, ...                          parquet: images inside; for large sets

A row has `messages` and `images`, and for evaluation `family`, `kind`, `answers` (accepted for the last turn) and
`document` (the image's name). The number of processes does not change what is made. A set that fails or is interrupted
leaves nothing behind.
"""

import io
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from examples.nano.making.documents.conversations import Conversation, conversations, joined
from examples.nano.making.documents.document import Document, make_document
from finetune.errors import UserError
from finetune.files.atomic_writes import write_text, writing_folder
from finetune.quantities import format_bytes, format_count, format_duration

Form = Literal["jsonl", "parquet"]
SHARD = {"jsonl": 100, "parquet": 1000}
"""Documents that a process makes at a time; one Parquet file holds as many."""
REPORT_SECONDS = {True: 0.5, False: 10.0}
"""Between two lines of progress, on a terminal and elsewhere."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to make.

    Attributes:
        families: taken in turn.
        kinds: of conversations.
        count: number of documents.
        per_image: conversations about each document.
        image_size: width and height in pixels.
        difficulty: see `page.Page`.
        palette: colours of an image; fewer make smaller files. None keeps all.
        joined: share of the documents whose conversations are joined into one of several turns.
    """

    split: str
    families: tuple[str, ...]
    kinds: tuple[str, ...]
    count: int
    per_image: int = 3
    image_size: int = 140
    difficulty: float = 0.5
    seed: int = 0
    palette: int | None = None
    joined: float = 0.0


@dataclass(frozen=True, slots=True)
class Made:
    """How much was made, by one process or by all."""

    documents: int
    images: int
    image_bytes: int
    rows: Counter[str]  # by kind


def document_of(plan: Plan, index: int, copy: int = 0) -> Document:
    """Document `index` of a set, or its copy to compare it with (see `make_document`)."""
    return make_document(
        plan.families[index % len(plan.families)],
        seed=plan.seed,
        split=plan.split,
        index=index,
        image_size=plan.image_size,
        difficulty=plan.difficulty,
        copy=copy,
    )


def conversations_of(plan: Plan, index: int, document: Document | None = None) -> list[Conversation]:
    """The conversations about document `index` of a set."""
    document = document_of(plan, index) if document is None else document
    # Questions have random numbers of their own, so that the kinds asked for do not change the images.
    draw = random.Random(f"{plan.seed}/{plan.split}/{document.family}/{index}/asked")
    others: list[Document] = []

    def partner() -> Document:
        if not others:
            others.append(document_of(plan, index, copy=1))
        return others[0]

    made = conversations(document, plan.kinds, plan.per_image, draw, plan.split, partner)
    return joined(made, draw) if draw.random() < plan.joined else made


def png(image: Image.Image, palette: int | None = None) -> bytes:
    """An image as a PNG file; a palette of that many colours makes the file smaller and takes longer."""
    encoded = io.BytesIO()
    if palette is None:
        image.save(encoded, "PNG", compress_level=3)  # higher levels cost a quarter of the speed for 1 % of the size
    else:
        # The default, median cut, spends all colours on the noise of the paper and turns a yellow ring blue.
        few = image.quantize(palette, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        few.save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


def write(plan: Plan, folder: Path, form: Form, workers: int) -> Made:
    """Write a set.

    Args:
        workers: processes.

    Raises:
        UserError: the folder has a set of this split already.
        OSError: the disk is full or fails; nothing is left behind.
    """
    rows_at = folder / (f"{plan.split}.jsonl" if form == "jsonl" else plan.split)
    if rows_at.exists():
        raise UserError(f"{rows_at} exists; delete it, or give another folder with --to")
    progress = _Progress(plan.count)
    # The rows are written last: images without them are left from an interrupted run and are replaced.
    with writing_folder(folder / "images" / plan.split if form == "jsonl" else rows_at) as target:
        lines: list[str] = []
        for texts, made in _shards(plan, target, form, workers):
            lines += texts
            progress.add(made)
    if form == "jsonl":
        write_text(rows_at, "".join(lines))
    return progress.done(rows_at)


def _shards(plan: Plan, target: Path, form: Form, workers: int) -> Iterator[tuple[list[str], Made]]:
    """Make all documents, shard by shard: the JSON lines of each, if it is written as such, and how much was made."""
    size = SHARD[form]
    make = partial(_make_shard, plan, target, form)
    starts = range(0, plan.count, size)
    if workers == 1 or len(starts) == 1:
        yield from map(make, starts)
        return
    import_module("qwenvl.text.boxes")  # takes seconds; forked processes inherit it
    pool = ProcessPoolExecutor(workers)
    try:
        yield from pool.map(make, starts)
    finally:
        pool.shutdown(cancel_futures=True)


def _make_shard(plan: Plan, target: Path, form: Form, start: int) -> tuple[list[str], Made]:
    """Make the documents of one shard, and write their images, or images and rows as a Parquet file.

    Returns:
        Rows as JSON lines, if they were not written, and how much was made.
    """
    rows: list[dict[str, Any]] = []
    images = image_bytes = 0
    indices = range(start, min(start + SHARD[form], plan.count))
    for index in indices:
        document = document_of(plan, index)
        encoded: dict[int, tuple[str, bytes]] = {}  # id(document) -> (file name, PNG), in the order of use
        for conversation in conversations_of(plan, index, document):
            for shown in conversation.documents:
                if id(shown) not in encoded:
                    name = f"{index:06}.png" if shown is document else f"{index:06}b.png"
                    encoded[id(shown)] = (name, png(shown.image, plan.palette))
            files = [encoded[id(shown)] for shown in conversation.documents]
            rows.append(_row(plan, document, conversation, files, form))
        for name, content in encoded.values():
            images, image_bytes = images + 1, image_bytes + len(content)
            if form == "jsonl":
                (target / name).write_bytes(content)
    made = Made(len(indices), images, image_bytes, Counter(row["kind"] for row in rows))
    if form == "jsonl":
        return [json.dumps(row, ensure_ascii=False) + "\n" for row in rows], made
    _write_parquet(rows, target / f"{start // SHARD[form]:05}.parquet")
    return [], made


def _row(
    plan: Plan, document: Document, conversation: Conversation, files: Sequence[tuple[str, bytes]], form: Form
) -> dict[str, Any]:
    images: list[Any]
    if form == "jsonl":
        images = [f"images/{plan.split}/{name}" for name, _ in files]
    else:
        images = [{"bytes": content, "path": name} for name, content in files]
    return {
        "messages": conversation.messages,
        "images": images,
        "family": document.family,
        "kind": conversation.kind,
        "answers": conversation.answers,
        "document": files[0][0].removesuffix(".png"),
    }


def _write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    import datasets
    import pyarrow.parquet as pq

    text, flag = datasets.Value("string"), datasets.Value("bool")
    part = {"type": text, "text": text}
    features = datasets.Features(
        {
            "messages": datasets.List({"role": text, "content": datasets.List(part), "grounding": flag}),
            "images": datasets.List(datasets.Image()),
            "family": text,
            "kind": text,
            "answers": datasets.List(text),
            "document": text,
        }
    )
    # Arrow needs every key in every row; None stands for a missing one.
    for row in rows:
        for message in row["messages"]:
            message.setdefault("grounding", None)
            for piece in message["content"]:
                piece.setdefault("text", None)
    table = datasets.Dataset.from_list(rows, features=features).with_format("arrow")[:]
    # Each row of a document has its image. Parquet's dictionary encoding stores it once, if the dictionary may be
    # large; `Dataset.to_parquet` turns it off for images. The metadata tells the datasets library what is an image.
    table = table.replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30)


class _Progress:
    """Progress on standard error: a line that is redrawn on a terminal, and a new line now and then elsewhere."""

    def __init__(self, total: int) -> None:
        self._total, self._start, self._live = total, time.monotonic(), sys.stderr.isatty()
        self._told = self._start
        self._made = Made(0, 0, 0, Counter())

    def add(self, made: Made) -> None:
        before = self._made
        self._made = Made(
            before.documents + made.documents,
            before.images + made.images,
            before.image_bytes + made.image_bytes,
            before.rows + made.rows,
        )
        now = time.monotonic()
        if now - self._told < REPORT_SECONDS[self._live]:
            return
        self._told = now
        speed = self._made.documents / (now - self._start)
        left = format_duration((self._total - self._made.documents) / speed)
        line = f"{self._made.documents}/{self._total} documents | {format_count(speed)} documents/s | {left} left"
        print(f"\r{line}\033[K" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True)

    def done(self, path: Path) -> Made:
        made = self._made
        if self._live:
            print("\r\033[K", end="", file=sys.stderr)
        took = time.monotonic() - self._start
        each = format_bytes(made.image_bytes / max(1, made.images))
        kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(made.rows.items()))
        print(f"{path}: {made.rows.total()} conversations about {made.documents} documents ({kinds})", file=sys.stderr)
        print(
            f"{made.images} images of {each} on average, {format_duration(took)}, "
            f"{format_count(made.documents / took)} documents/s",
            file=sys.stderr,
        )
        return made
