"""Single samples as the model reads them, split for display: text, control tokens, images; trained or not."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

import numpy as np

from finetune.data.checking import Rules
from finetune.data.reading import DataPart
from finetune.data.sample import Sample
from finetune.data.shortening import Fitted
from finetune.quantities import format_bytes
from finetune.report.page import readable
from qwenvl.text.chat import IGNORED, Rendered
from qwenvl.text.tokenizer import QwenVLTokenizer
from qwenvl.views import PagePart

LONGEST_NAME = 80  # characters of an image's name


class Piece(NamedTuple):
    """Neighbouring tokens of one kind, decoded; for an image, a description of it."""

    text: str
    kind: Literal["text", "control", "image"]
    trained: bool


@dataclass(frozen=True)
class Preview:
    """A sample to show.

    Attributes:
        part: "train" or "eval".
        sample: as it is in the data; `fitted`, as it is trained.
        pieces: of all its tokens.
    """

    part: str
    sample: Sample
    fitted: Fitted
    pieces: Sequence[Piece]


def choose_samples(parts: Mapping[str, DataPart], count: int, seed: int) -> list[tuple[str, int]]:
    """Which samples to show, as (part, index): the first of the training data, one of each other source of training
    and evaluation data, then some that the seed draws from the training data. At most `count`, each once."""
    wanted: dict[tuple[str, int], None] = {}
    shown = {name: part.checked for name, part in parts.items() if part.checked is not None and len(part.checked.kept)}
    for name, checked in shown.items():
        # Ascending, so that the first of each number is its source's first sample.
        for place in np.unique(checked.source, return_index=True)[1]:
            wanted[name, int(checked.kept[place])] = None
    if "train" in shown:
        kept = shown["train"].kept
        # More than enough to fill up with, some of which may be shown already.
        for place in np.random.default_rng(seed).permutation(len(kept))[: count + len(wanted)]:
            wanted["train", int(kept[place])] = None
    return list(islice(wanted, count))


def preview(part: str, sample: Sample, rules: Rules) -> Preview:
    """Prepare a valid sample for display."""
    fitted = rules.fit(sample.messages)
    return Preview(part, sample, fitted, take_apart(fitted.rendered, rules.tokenizer))


def take_apart(rendered: Rendered, tokenizer: QwenVLTokenizer) -> list[Piece]:
    """All tokens of a conversation in order; each image is one piece, `[image 1: receipt.jpg, 258 tokens]`."""
    control = frozenset(tokenizer.control_tokens.values())
    pieces: list[Piece] = []
    number = 0
    start = 0
    while start < len(rendered.ids):
        if rendered.ids[start] == tokenizer.image_start_id:
            end = rendered.ids.index(tokenizer.image_end_id, start) + 1
            name = image_name(rendered.images[number])
            number += 1
            pieces.append(Piece(f"[image {number}: {name}, {end - start} tokens]", "image", False))
        else:
            end = start + 1
            while end < len(rendered.ids) and rendered.ids[end] != tokenizer.image_start_id:
                end += 1
            run = zip(rendered.ids[start:end], rendered.labels[start:end], strict=True)
            for (is_control, trained), tokens in groupby(run, lambda pair: (pair[0] in control, pair[1] != IGNORED)):
                text = tokenizer.decode([token for token, _ in tokens])
                assert isinstance(text, str), "the ids of one text, not of a batch"
                pieces.append(Piece(text, "control" if is_control else "text", trained))
        start = end
    return pieces


def image_name(source: Any) -> str:
    """A name for an image: the last part of its path or URL, or its size in bytes; and which part of it, if one."""
    if isinstance(source, PagePart):
        return f"{image_name(source.source)}, {source.place}"
    if isinstance(source, Mapping):
        source = source.get("path") or source.get("bytes")
    if isinstance(source, bytes):
        return format_bytes(len(source))
    text = str(source)
    if re.match("data:", text, re.IGNORECASE):
        return f"data URI of {len(text):,} characters"
    name = PurePath(text).name or text
    return name if len(name) <= LONGEST_NAME else f"{name[:50]}...{name[-27:]}"


def one_line(text: object) -> str:
    """Data as text for one line of a terminal: nothing in it moves the cursor, breaks the line or sets colours."""
    return readable(text).replace("\n", "␊").replace("\t", " ")
