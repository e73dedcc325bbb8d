"""Check all data before training: every row is rendered, none of its images is opened.

Every image takes the same number of tokens, so lengths are exact without pixels. What cannot be trained on is reported
with its file, row, field and reason, or counted; nothing is dropped silently.
"""

import contextlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from finetune.data.epoch_draw import EpochDraws
from finetune.data.message_parts import boxes_inside, system_message
from finetune.data.overlap import Identities
from finetune.data.problems import find_problems, together
from finetune.data.row_digest import row_digest
from finetune.data.row_progress import RowProgress
from finetune.data.sample import BadField, BadRow, DataError, Origin, Sample
from finetune.data.samples import Samples
from finetune.data.shortening import Fitted, OnLong, render_fitting
from finetune.data.worker_processes import map_chunks
from finetune.errors import InputError
from qwenvl.images.images import ImageAccess
from qwenvl.text.chat import LabelRule
from qwenvl.text.tokenizer import QwenVLTokenizer
from qwenvl.views import Views, whole_of

CHUNK = 1000
"""Samples checked at once. Chunks are independent of one another, so several processes can check them."""


@dataclass(frozen=True, slots=True)
class TooLong:
    """A sample left out for its length.

    Attributes: `origin`; `tokens`, its length; `cost`, what of it is the work of `data.pages` and `data.views`, in
    words, empty without them.
    """

    origin: Origin
    tokens: int
    cost: str = ""


@dataclass(frozen=True, slots=True)
class Shortened:
    """A sample that is trained on without its first turns, with which it is too long.

    Attributes: `origin`; `turns_dropped`, turns left out.
    """

    origin: Origin
    turns_dropped: int


@dataclass(frozen=True)
class Checked:
    """What a check of all samples found. The arrays have one entry for each sample that is kept.

    Every sample is in exactly one of `kept`, `dropped_long` and the `refused` ones.

    Attributes:
        kept: (kept,) int64, indices into the samples, ascending.
        lengths: (kept,) int64, tokens; like the next two, after turns were left out.
        images: (kept,) int64, images of the sample; with views, pictures.
        supervised: (kept,) int64, trained tokens.
        source: (kept,) int64, which of the sources the sample is from.
        weights: of the sources.
        problems: one for each row (or sample of it) that cannot be used.
        refused: samples that are left out for these problems; more than the problems where a row makes several.
        dropped_long: samples left out because they are longer than allowed.
        shortened: those of the kept ones that lost turns.
        systems: the system messages of the kept samples, None for the default one; at most two of them, as more than
            one is all that is asked of them.
        redraws: each epoch draws its own samples by the weights. False draws once: for evaluation, and for a run that
            began when all epochs had the same draw.
        pages_left_out: pages of files that are not trained on, as `data.pages` says, over the kept samples.
        identities: what the kept samples are made of, where the rules ask for it.
        unread: columns and keys of the kept samples that hold something and are not read -> samples that have them.
        markup: kinds of markup that the kept samples train as text, as the rules allow -> samples that have them.
        digests: (total,) uint64, of all samples in order, see `row_digest`; 0 for refused ones.
        image_keys: (images of all kept samples,) uint64, in their order: equal for images of one path and their parts,
            0 for images that have none.
        pictures: of one image, see `Rules.views`.
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
    shortened: list[Shortened]
    systems: tuple[str | None, ...] = ()
    redraws: bool = True
    pages_left_out: int = 0
    identities: Identities = field(default_factory=Identities, repr=False)
    unread: Mapping[str, int] = field(default_factory=dict)
    markup: Mapping[str, int] = field(default_factory=dict)
    digests: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    image_keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    pictures: int = 1

    @property
    def system(self) -> str | None:
        """The system message of all kept samples; None for the default one, or where they differ in it."""
        return self.systems[0] if len(self.systems) == 1 else None

    @property
    def total(self) -> int:
        """Samples that were checked."""
        return len(self.kept) + self.refused + len(self.dropped_long)

    def weighted_indices(self, seed: int) -> list[int]:
        """The kept samples' indices in order, each as often as the weight of its source says: one draw for all times.

        A weight of 2.5 is every sample twice and a half of them a third time, which the seed draws. So evaluation data
        is used, and training data where it needs no other draws: see `epochs`.
        """
        times = np.empty(len(self.kept), np.int64)
        for number, weight in enumerate(self.weights):
            places = np.flatnonzero(self.source == number)
            whole = int(weight)
            times[places] = whole
            extra = round((weight - whole) * len(places))
            times[np.random.default_rng([seed, number]).permutation(places)[:extra]] += 1
        return np.repeat(self.kept, times).tolist()

    def epochs(self, seed: int) -> EpochDraws | None:
        """What each epoch of a training draws; None where all epochs draw the same, `weighted_indices`."""
        if not self.redraws or all(float(weight).is_integer() for weight in self.weights) or not len(self.kept):
            return None
        return EpochDraws(self.kept, self.source, self.weights, seed)

    def first_epoch(self, seed: int) -> list[int]:
        """What the first epoch draws. All epochs have as many samples."""
        draws = self.epochs(seed)
        return self.weighted_indices(seed) if draws is None else draws.indices(0).tolist()


@dataclass(frozen=True)
class Rules:
    """How training renders a sample, and which samples it leaves out.

    Attributes:
        tokenizer, labels, grounding, n_queries: as for `chat.render_chat`.
        max_length: tokens a sample may have; None is any number.
        on_long: "error" refuses data with longer samples, "drop" leaves these out and counts them, "drop_turns" leaves
            out turns at their front where that is enough (see `shortening.render_fitting`).
        on_bad_row: "error" refuses data with samples that cannot be used, "skip" leaves these out and lists them.
        box_edge: what coordinates of 1000 in boxes are: an "error", or with "clamp" 999.
        identify: note what each sample is made of, to find those that train and evaluate (see `overlap`).
        markup_as_text: kinds of markup that are text where no format reads them (see `markup`); others are refused.
        views: what pictures an image becomes; None is itself alone.
    """

    tokenizer: QwenVLTokenizer
    max_length: int | None
    n_queries: int = 256
    labels: LabelRule = "assistant"
    grounding: bool = False
    on_long: OnLong = "error"
    on_bad_row: Literal["error", "skip"] = "error"
    box_edge: Literal["error", "clamp"] = "error"
    identify: bool = False
    markup_as_text: frozenset[str] = frozenset()
    views: Views | None = None

    @property
    def pictures(self) -> int:
        """Pictures of one image."""
        return 1 if self.views is None else self.views.count

    def fit(self, messages: Sequence[Mapping[str, Any]]) -> Fitted:
        """Render messages as they are trained.

        Raises:
            InputError: as `chat.render_chat`.
        """
        return render_fitting(
            self.read(messages),
            self.tokenizer,
            max_length=self.max_length,
            on_long=self.on_long,
            labels=self.labels,
            grounding=self.grounding,
            n_queries=self.n_queries,
            views=self.views,
        )

    def cost(self, pictures: int, more_pages: int) -> str:
        """What the pictures of a sample cost, where recipe keys made several of an image: which, and what to do.

        Args:
            pictures: of the sample, as rendered.
            more_pages: of the sample.
        """
        made = []
        if more_pages:
            made.append((f"data.pages shows {more_pages:,} pages more", "fewer pages (data.pages.first)"))
        if self.views is not None:
            made.append((f"data.views makes {self.views.count} of an image", "fewer parts (data.views.grid)"))
        if not made or not pictures:
            return ""
        tokens = pictures * (self.n_queries + 2)
        keys, remedies = zip(*made, strict=True)
        return (
            f" ({tokens:,} of them are {pictures:,} pictures: {' and '.join(keys)}; {', '.join(remedies)}, or a "
            "larger max_length)"
        )

    def read(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """The messages with coordinates at the image's edge as `box_edge` says."""
        return messages if self.box_edge == "error" else boxes_inside(messages, self.grounding)


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
        tokenizer, max_length, n_queries, labels, grounding, on_long, on_bad_row, markup_as_text=markup_as_text
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
