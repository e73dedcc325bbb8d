"""Single samples as the model reads them, split for display: text, control tokens, images; trained or not."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

import numpy as np

from finetune.data.checks.problems import find_problems
from finetune.data.checks.rules import Rules
from finetune.data.checks.shortening import Fitted
from finetune.data.message_parts import boxes_inside, image_sources
from finetune.data.reading import DataPart
from finetune.data.sample import Sample
from finetune.quantities import format_bytes
from finetune.report.page import readable
from qwenvl.text.chat import IGNORED, Rendered, is_trained
from qwenvl.text.tokenizer import QwenVLTokenizer
from qwenvl.views import PagePart

LONGEST_NAME = 80  # characters of an image's name


class Piece(NamedTuple):
    """Neighbouring tokens of one kind, decoded; for an image, a description of it.

    `context`: they are of a reply that is marked as untrained.
    """

    text: str
    kind: Literal["text", "control", "image"]
    trained: bool
    context: bool = False


@dataclass(frozen=True)
class Preview:
    """A sample to show.

    Attributes:
        part: "train" or "eval".
        sample: as it is in the data; `fitted`, as it is trained.
        pieces: of all its tokens.
        left_out: what of the row is not trained on, or not as it stands there, in lines.
    """

    part: str
    sample: Sample
    fitted: Fitted
    pieces: Sequence[Piece]
    left_out: Sequence[str] = ()


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
    marked = [not is_trained(message) for message in fitted.messages if message["role"] == "assistant"]
    pieces = take_apart(fitted.rendered, rules.tokenizer, marked)
    return Preview(part, sample, fitted, pieces, list(_left_out(sample, fitted, rules)))


def _left_out(sample: Sample, fitted: Fitted, rules: Rules) -> Iterator[str]:
    """What of a row is not trained on, or not as it stands there."""
    if sample.unread:
        yield f"not read: {', '.join(sample.unread)}"
    if fitted.turns_dropped:
        turns = "turn" if fitted.turns_dropped == 1 else f"{fitted.turns_dropped} turns"
        images = sum(1 for _ in image_sources(sample.messages)) - sum(1 for _ in image_sources(fitted.messages))
        more = f", and with them {images} {'image' if images == 1 else 'images'}" if images else ""
        yield f"left out for its length (on_long: drop_turns): its first {turns}{more}"
    if sample.pages_left_out:
        pages = "page" if sample.pages_left_out == 1 else "pages"
        yield f"left out (data.pages.first): {sample.pages_left_out} {pages}"
    context = sum(message["role"] == "assistant" and not is_trained(message) for message in fitted.messages)
    if context and rules.train_on == "last":
        yield f"context (data.train_on: last): {context} {'reply' if context == 1 else 'replies'} before the last"
    elif context:
        yield f"context, marked in the row as untrained: {context} {'reply' if context == 1 else 'replies'}"
    clamped = sample.messages if rules.box_edge == "error" else boxes_inside(sample.messages, rules.grounding)
    if list(map(dict, clamped)) != list(map(dict, sample.messages)):
        yield "coordinates of 1000 are read as 999 (data.box_edge: clamp)"
    _, markup = find_problems(
        sample, grounding=rules.grounding, markup_as_text=rules.markup_as_text, box_edge=rules.box_edge,
        views=rules.views,
    )  # fmt: skip
    if kinds := [kind for kind in dict.fromkeys(markup) if kind in rules.markup_as_text]:
        yield f"trained as words (data.markup_as_text): {', '.join(kinds)}"


def take_apart(rendered: Rendered, tokenizer: QwenVLTokenizer, untrained: Sequence[bool] = ()) -> list[Piece]:
    """All tokens of a conversation in order; each image is one piece, `[image 1: receipt.jpg, 258 tokens]`.

    Args:
        rendered: of the conversation.
        untrained: of each reply in order, whether it is marked as context.
    """
    control = frozenset(tokenizer.control_tokens.values())
    context = _context(rendered.ids, tokenizer, untrained)
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
            run = zip(rendered.ids[start:end], rendered.labels[start:end], context[start:end], strict=True)
            for (is_control, trained, marked), tokens in groupby(
                run, lambda token: (token[0] in control, token[1] != IGNORED, token[2])
            ):
                text = tokenizer.decode([token for token, _, _ in tokens])
                assert isinstance(text, str), "the ids of one text, not of a batch"
                pieces.append(Piece(text, "control" if is_control else "text", trained, marked))
        start = end
    return pieces


def _context(ids: Sequence[int], tokenizer: QwenVLTokenizer, untrained: Sequence[bool]) -> list[bool]:
    """Of each token, whether it is of a reply that is marked as context: without the role before it."""
    context = [False] * len(ids)
    if not any(untrained):
        return context
    head = [tokenizer.im_start_id, *tokenizer.encode_text("assistant"), *tokenizer.encode_text("\n")]
    starts = [place + len(head) for place in range(len(ids)) if [*ids[place : place + len(head)]] == head]
    for start, marked in zip(starts, untrained, strict=True):
        if marked:
            end = ids.index(tokenizer.im_end_id, start)
            context[start:end] = [True] * (end - start)
    return context


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
