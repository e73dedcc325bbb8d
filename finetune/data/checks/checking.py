"""Check all data before training: every row is rendered, none of its images is opened.

Every image takes the same number of tokens, so lengths are exact without pixels. What cannot be trained on is reported
with its file, row, field and reason, or counted; nothing is dropped silently.
"""

import contextlib
from array import array
from collections import Counter
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from finetune.data.checks.checked import Checked, Shortened, TooLong
from finetune.data.checks.overlap import Identities
from finetune.data.checks.problems import find_problems, together
from finetune.data.checks.row_digest import row_digest
from finetune.data.checks.rules import Rules
from finetune.data.checks.shortening import Fitted, OnLong
from finetune.data.message_parts import system_message
from finetune.data.row_progress import RowProgress
from finetune.data.sample import BadField, BadRow, DataError, Sample
from finetune.data.samples import Samples
from finetune.data.worker_processes import map_chunks
from finetune.errors import InputError
from qwenvl.images.images import ImageAccess
from qwenvl.text.chat import LabelRule
from qwenvl.text.tokenizer import QwenVLTokenizer
from qwenvl.views import whole_of

CHUNK = 1000
"""Samples checked at once. Chunks are independent of one another, so several processes can check them."""


def check_samples(
    samples: Samples,
    tokenizer: QwenVLTokenizer,
    *,
    max_length: int | None,
    n_queries: int = 256,
    labels: LabelRule = "assistant",
    grounding: bool = False,
    on_long: OnLong = "error",
    on_bad_row: Literal["error", "skip"] = "error",
    markup_as_text: frozenset[str] = frozenset(),
    show_progress: bool = True,
    processes: int | None = None,
) -> Checked:
    """Render every sample and raise where it cannot be trained on: `look_at`, and its `refusal` as an error.

    Args:
        samples: all of them.
        tokenizer, max_length, n_queries, labels, grounding, on_long, on_bad_row, markup_as_text: see `Rules`.
        show_progress, processes: see `look_at`.

    Raises:
        DataError: rows cannot be used or are too long, and the rules make that an error; all are listed together. Or
            no sample is left.
        WorkerDied: a worker process was killed or crashed.
    """
    rules = Rules(
        tokenizer,
        max_length,
        n_queries,
        labels,
        grounding=grounding,
        on_long=on_long,
        on_bad_row=on_bad_row,
        markup_as_text=markup_as_text,
    )
    checked = look_at(samples, rules, show_progress=show_progress, processes=processes)
    if error := refusal(checked, rules):
        raise error
    return checked


def look_at(samples: Samples, rules: Rules, *, show_progress: bool = True, processes: int | None = None) -> Checked:
    """Render every sample, keep what can be trained on, and list the rest.

    A sample cannot be used if its row does not have the form of its format or holds what the format does not read and
    would change training, an image does not exist, nothing in it is trained, or markup would be trained as plain text:
    malformed grounding markup, or that of another format. The whole row is checked, also the turns that are left out
    for its length.

    Args:
        samples: all of them.
        rules: what they are checked by.
        show_progress: show a bar on a terminal, or lines elsewhere, if it takes longer than a few seconds.
        processes: how many check; the result is the same for any number. None takes several where there is enough to
            do (see `worker_processes.map_chunks`).

    Raises:
        WorkerDied: a worker process was killed or crashed.
    """
    found = _Found()
    chunks = [range(start, min(start + CHUNK, len(samples))) for start in range(0, len(samples), CHUNK)]
    with (
        RowProgress("checking data", len(samples), shown=show_progress) as progress,
        contextlib.closing(map_chunks(check_chunk, (samples, rules), chunks, processes)) as results,
    ):
        for chunk, result in zip(chunks, results, strict=True):
            found.add(result)
            progress.add(len(chunk))
    return replace(found.checked(samples), pictures=rules.pictures)


def refusal(checked: Checked, rules: Rules) -> DataError | None:
    """Why a run would not train on this data, as an error to raise; None where it would."""
    errors = checked.problems if rules.on_bad_row == "error" else []
    if rules.on_long == "error":
        reason = f"tokens, more than max_length={rules.max_length}"
        errors = errors + [
            BadRow(long.origin, "length", f"{long.tokens:,} {reason}{long.cost}") for long in checked.dropped_long
        ]
    if errors:
        return DataError(_summary(checked, rules), errors)
    if not len(checked.kept):
        return DataError(f"none of the {checked.total:,} samples can be trained on:", checked.problems)
    return None


@dataclass
class _Found:
    """What was found in some samples, in their order."""

    kept: "array[int]" = field(default_factory=lambda: array("q"))
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    images: "array[int]" = field(default_factory=lambda: array("q"))
    supervised: "array[int]" = field(default_factory=lambda: array("q"))
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    image_keys: "array[int]" = field(default_factory=lambda: array("Q"))
    systems: list[str | None] = field(default_factory=list)
    problems: list[BadRow] = field(default_factory=list)
    refused: int = 0
    dropped_long: list[TooLong] = field(default_factory=list)
    shortened: list[Shortened] = field(default_factory=list)
    pages_left_out: int = 0
    identities: Identities = field(default_factory=Identities)
    unread: Counter[str] = field(default_factory=Counter)
    markup: Counter[str] = field(default_factory=Counter)

    def refuse(self, problem: BadRow) -> None:
        self.refused += 1
        # The samples of one row share its problem, which is listed once.
        if not self.problems or problem.args != self.problems[-1].args:
            # A copy: the traceback of one that was raised keeps alive all that was read then.
            self.problems.append(BadRow(*problem.args))

    def keep_system(self, system: str | None) -> None:
        if len(self.systems) < 2 and system not in self.systems:
            self.systems.append(system)

    def add(self, later: "_Found") -> None:
        for system in later.systems:
            self.keep_system(system)
        for name in ("kept", "lengths", "images", "supervised", "digests", "image_keys", "dropped_long", "shortened"):
            getattr(self, name).extend(getattr(later, name))
        self.identities.extend(later.identities)
        self.unread.update(later.unread)
        self.markup.update(later.markup)
        for problem in later.problems:
            self.refuse(problem)
        self.refused += later.refused - len(later.problems)
        self.pages_left_out += later.pages_left_out

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
            shortened=self.shortened,
            systems=tuple(self.systems),
            pages_left_out=self.pages_left_out,
            identities=self.identities,
            unread=dict(self.unread.most_common()),
            markup=dict(self.markup.most_common()),
            digests=np.array(self.digests, np.uint64),
            image_keys=np.array(self.image_keys, np.uint64),
        )


def check_chunk(task: tuple[Samples, Rules], chunk: range) -> _Found:
    """Check the samples of a range of indices."""
    samples, rules = task
    found = _Found()
    for index, sample in zip(chunk, samples.scan(chunk.start, chunk.stop), strict=True):
        if isinstance(sample, BadRow):
            found.refuse(sample)
            found.digests.append(0)
            continue
        try:
            fitted, markup = _check(sample, rules)
        except BadField as error:
            found.refuse(BadRow(sample.origin, error.field, error.reason))
            found.digests.append(0)
            continue
        found.digests.append(row_digest(sample))
        rendered = fitted.rendered
        if rules.max_length is not None and len(rendered.ids) > rules.max_length:
            cost = rules.cost(len(rendered.images), sample.more_pages)
            found.dropped_long.append(TooLong(sample.origin, len(rendered.ids), cost))
            continue
        found.kept.append(index)
        found.lengths.append(len(rendered.ids))
        found.images.append(len(rendered.images))
        found.supervised.append(rendered.supervised)
        found.pages_left_out += sample.pages_left_out
        found.image_keys.extend(_image_key(source, sample.access) for source in rendered.images)
        found.keep_system(system_message(sample.messages))
        if rules.identify:
            found.identities.add(sample)
        if sample.unread:
            found.unread.update(sample.unread)
        if markup:
            found.markup.update(markup)
        if fitted.turns_dropped:
            found.shortened.append(Shortened(sample.origin, fitted.turns_dropped))
    return found


def _check(sample: Sample, rules: Rules) -> tuple[Fitted, list[str]]:
    """The sample as it is trained, and the kinds of markup in it that are text by the rules.

    Raises:
        BadField: what is wrong with it, all reasons together.
    """
    problems, markup = find_problems(
        sample,
        grounding=rules.grounding,
        markup_as_text=rules.markup_as_text,
        box_edge=rules.box_edge,
        views=rules.views,
        train_on=rules.train_on,
    )
    fitted = None
    try:
        fitted = rules.fit(sample.messages)
    except InputError as error:  # what only the tokenizer finds, such as half a surrogate pair
        problems.insert(0, BadField("messages", str(error)))
    if problems:
        raise together(problems)
    assert fitted is not None, "it was rendered, or there is a problem"
    return fitted, markup


def _image_key(source: Any, access: ImageAccess) -> int:
    """64 bits of a digest of the path of an image, or of the one that it is a part of; 0 where it has none."""
    source = whole_of(source)
    if not isinstance(source, str):
        return 0
    text = f"{access.root}\n{source}".encode(errors="surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") or 1


def _summary(checked: Checked, rules: Rules) -> str:
    said = []
    if checked.problems and rules.on_bad_row == "error":
        said.append(f"{checked.refused:,} cannot be used (fix them, or leave them out with on_bad_row: skip)")
    if checked.dropped_long and rules.on_long == "error":
        longest = max(long.tokens for long in checked.dropped_long)
        said.append(
            f"{len(checked.dropped_long):,} are too long, the longest has {longest:,} tokens (raise max_length, leave "
            "them out with on_long: drop, or their first turns with on_long: drop_turns)"
        )
    return f"of {checked.total:,} samples, {' and '.join(said)}:"
