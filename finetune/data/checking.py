"""All data looked at before training: every row rendered, none of its images opened.

An image takes the same number of tokens whatever it shows, so lengths are exact without pixels. What cannot be trained
on is reported with its file, row, field and reason, or counted; nothing is lost silently.
"""

import sys
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from finetune.data.image_files import check_image
from finetune.data.sample import BadField, BadRow, DataError, Origin, Sample
from finetune.data.samples import Samples
from qwenvl.chat import LabelRule, Rendered, render_chat
from qwenvl.grounding import parse_grounding
from qwenvl.tokenizer import QwenVLTokenizer

CHUNK = 1000
"""Samples checked at once. Chunks do not depend on one another, so they may as well be checked side by side."""
QUIET_SECONDS = 3.0  # nothing is shown of a check that is done by then
LINE_SECONDS = 10.0  # between two lines where there is no terminal


@dataclass(frozen=True)
class TooLong:
    """A sample left out for its length.

    Attributes: `origin`; `tokens`, its length.
    """

    origin: Origin
    tokens: int


@dataclass(frozen=True)
class Checked:
    """What `check_samples` found. The arrays have one entry for each sample that is kept.

    Every sample is in exactly one of `kept`, `dropped_long` and the `refused` ones.

    Attributes:
        kept: (kept,) int64, indices into the samples, ascending.
        lengths: (kept,) int64, tokens.
        images: (kept,) int64, images of the sample.
        supervised: (kept,) int64, trained tokens.
        source: (kept,) int64, which of the sources the sample is from.
        weights: of the sources.
        problems: one for each row (or sample of it) that cannot be used.
        refused: samples that are left out for these problems; more than the problems where one row gives several.
        dropped_long: samples left out because they are longer than allowed.
    """

    kept: np.ndarray
    lengths: np.ndarray
    images: np.ndarray
    supervised: np.ndarray
    source: np.ndarray
    weights: list[float]
    problems: list[BadRow]
    refused: int
    dropped_long: list[TooLong]

    @property
    def total(self) -> int:
        """Samples that were looked at."""
        return len(self.kept) + self.refused + len(self.dropped_long)

    def weighted_indices(self, seed: int) -> list[int]:
        """The kept samples' indices in order, each as often as the weight of its source says.

        A weight of 2.5 is every sample twice and a half of them a third time; which half, the seed draws, the same for
        every epoch.
        """
        times = np.empty(len(self.kept), np.int64)
        for number, weight in enumerate(self.weights):
            places = np.flatnonzero(self.source == number)
            whole = int(weight)
            times[places] = whole
            extra = round((weight - whole) * len(places))
            times[np.random.default_rng([seed, number]).permutation(places)[:extra]] += 1
        return np.repeat(self.kept, times).tolist()


def check_samples(
    samples: Samples,
    tokenizer: QwenVLTokenizer,
    *,
    max_length: int | None,
    n_queries: int = 256,
    labels: LabelRule = "assistant",
    grounding: bool = False,
    on_long: Literal["error", "drop"] = "error",
    on_bad_row: Literal["error", "skip"] = "error",
    show_progress: bool = True,
) -> Checked:
    """Render every sample and see whether it can be trained on.

    A sample cannot be used when its row is not as its format wants it, an image is not where it is said to be, nothing
    in it is trained, or grounding markup in it is malformed, and would be trained as plain text.

    Args:
        samples: all of them.
        tokenizer, n_queries, labels, grounding: as for `chat.render_chat`; what training will use.
        max_length: tokens a sample may have; None is any number.
        on_long: what becomes of longer ones. "drop" leaves them out and counts them; they are never cut.
        on_bad_row: what becomes of a sample that cannot be used. "skip" leaves it out and lists it.
        show_progress: show a bar on a terminal, or lines elsewhere, if it takes longer than some seconds.

    Raises:
        DataError: some rows cannot be used or are too long and that is an error, listed together after all were read;
            or none is left.
    """
    rules = _Rules(tokenizer, max_length, n_queries, labels, grounding)
    found = _Found()
    chunks = [range(start, min(start + CHUNK, len(samples))) for start in range(0, len(samples), CHUNK)]
    for chunk in _shown(chunks, len(samples), show_progress):
        found.add(check_chunk(samples, chunk, rules))

    errors = found.problems if on_bad_row == "error" else []
    if on_long == "error":
        reason = f"tokens, more than max_length={max_length}"
        errors = errors + [BadRow(long.origin, "length", f"{long.tokens:,} {reason}") for long in found.dropped_long]
    if errors:
        raise DataError(_summary(found, len(samples), on_bad_row, on_long), errors)
    if not found.kept:
        raise DataError(f"none of the {len(samples):,} samples can be trained on:", found.problems)
    return found.checked(samples)


@dataclass(frozen=True)
class _Rules:
    tokenizer: QwenVLTokenizer
    max_length: int | None
    n_queries: int
    labels: LabelRule
    grounding: bool


@dataclass
class _Found:
    """What was found in some samples, in their order."""

    kept: array = field(default_factory=lambda: array("q"))
    lengths: array = field(default_factory=lambda: array("q"))
    images: array = field(default_factory=lambda: array("q"))
    supervised: array = field(default_factory=lambda: array("q"))
    problems: list[BadRow] = field(default_factory=list)
    refused: int = 0
    dropped_long: list[TooLong] = field(default_factory=list)

    def refuse(self, problem: BadRow) -> None:
        self.refused += 1
        # The samples of one row share its problem, and it is told once.
        if not self.problems or problem.args != self.problems[-1].args:
            self.problems.append(problem)

    def add(self, later: "_Found") -> None:
        for name in ("kept", "lengths", "images", "supervised", "dropped_long"):
            getattr(self, name).extend(getattr(later, name))
        for problem in later.problems:
            self.refuse(problem)
        self.refused += later.refused - len(later.problems)

    def checked(self, samples: Samples) -> Checked:
        kept = np.array(self.kept, np.int64)
        ends = [source.stop for source in samples.ranges]
        return Checked(
            kept=kept,
            lengths=np.array(self.lengths, np.int64),
            images=np.array(self.images, np.int64),
            supervised=np.array(self.supervised, np.int64),
            source=np.searchsorted(ends, kept, side="right"),
            weights=samples.weights,
            problems=self.problems,
            refused=self.refused,
            dropped_long=self.dropped_long,
        )


def check_chunk(samples: Samples, chunk: range, rules: _Rules) -> _Found:
    """Check the samples of a range of indices."""
    found = _Found()
    for index, sample in zip(chunk, samples.scan(chunk.start, chunk.stop), strict=True):
        if isinstance(sample, BadRow):
            found.refuse(sample)
            continue
        try:
            rendered = _check(sample, rules)
        except BadField as error:
            found.refuse(BadRow(sample.origin, error.field, error.reason))
            continue
        if rules.max_length is not None and len(rendered.ids) > rules.max_length:
            found.dropped_long.append(TooLong(sample.origin, len(rendered.ids)))
            continue
        found.kept.append(index)
        found.lengths.append(len(rendered.ids))
        found.images.append(len(rendered.images))
        found.supervised.append(rendered.supervised)
    return found


def _check(sample: Sample, rules: _Rules) -> Rendered:
    for place, text in _grounding_texts(sample.messages, rules.grounding):
        if problems := parse_grounding(text).problems:
            raise BadField(place, f"malformed grounding markup: {problems[0].reason}")
    try:
        rendered = render_chat(
            sample.messages,
            rules.tokenizer,
            labels=rules.labels,
            grounding=rules.grounding,
            n_queries=rules.n_queries,
        )
    except ValueError as error:  # half a surrogate pair, say: what only the tokenizer can know
        raise BadField("messages", str(error)) from error
    for number, source in enumerate(rendered.images):
        try:
            check_image(source, sample.access)
        except ValueError as error:
            raise BadField(f"images[{number}]", str(error)) from error
    # Asked of the messages, as the rule "structure" finds something to train in every conversation.
    if not rendered.supervised or all(message["role"] != "assistant" for message in sample.messages):
        raise BadField("messages", "nothing in it is trained: it has no assistant's turn")
    return rendered


def _grounding_texts(messages: Sequence[Mapping[str, Any]], everywhere: bool) -> Iterator[tuple[str, str]]:
    """(place, text) of what will be read as grounding markup."""
    for index, message in enumerate(messages):
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            marked = everywhere or message.get("grounding") or part.get("grounding")
            if part["type"] == "text" and marked and "<" in part["text"]:
                yield f"messages[{index}]", part["text"]


def _summary(found: _Found, total: int, on_bad_row: str, on_long: str) -> str:
    said = []
    if found.problems and on_bad_row == "error":
        said.append(f"{found.refused:,} cannot be used (mend them, or leave them out with on_bad_row: skip)")
    if found.dropped_long and on_long == "error":
        longest = max(long.tokens for long in found.dropped_long)
        said.append(
            f"{len(found.dropped_long):,} are too long, the longest has {longest:,} tokens (raise max_length, or "
            "leave them out with on_long: drop)"
        )
    return f"of {total:,} samples, {' and '.join(said)}:"


def _shown(chunks: Sequence[range], total: int, show: bool) -> Iterable[range]:
    """The chunks, and meanwhile how far it is."""
    if not show:
        return chunks
    return _with_bar(chunks, total) if sys.stderr.isatty() else _with_lines(chunks, total)


def _with_bar(chunks: Sequence[range], total: int) -> Iterator[range]:
    with tqdm(total=total, desc="checking data", unit=" rows", delay=QUIET_SECONDS, leave=False) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk))


def _with_lines(chunks: Sequence[range], total: int) -> Iterator[range]:
    said = time.monotonic() + QUIET_SECONDS - LINE_SECONDS
    for chunk in chunks:
        if time.monotonic() - said >= LINE_SECONDS:
            print(f"checking data: {chunk.start:,} of {total:,} rows", file=sys.stderr, flush=True)
            said = time.monotonic()
        yield chunk
