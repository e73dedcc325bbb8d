"""Summaries of checked data, for the terminal, run.json and the list of rows left out."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from finetune.data.checks.checked import Checked
from finetune.data.checks.rules import Rules
from finetune.data.sample import BadRow
from finetune.data.samples import Samples
from finetune.recipe import Data
from finetune.recipe.sources import Source

# In the text of a problem, what is of one row only: quoted data, and numbers.
_DETAIL = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|-?\d[\d,.]*""")
_LONGEST_KIND = 160  # characters
_SHOWN_NAMES = 12  # columns that are named
_LONGEST_NAME = 60  # characters


def describe_data(checked: Checked) -> str:
    """One line: rows, tokens, images, trained share, what was left out, and what of the rows is not read."""
    lengths = checked.lengths
    text = (
        f"{len(checked.kept):,} of {checked.total:,} rows, {int(lengths.sum()):,} tokens "
        f"({checked.supervised.sum() / max(lengths.sum(), 1):.1%} trained), "
        f"{int(checked.images.sum()) // checked.pictures:,} images"
    )
    if checked.pictures > 1:
        text += f" as {int(checked.images.sum()):,} pictures (data.views)"
    left_out = [
        f"{len(checked.dropped_long):,} too long" if checked.dropped_long else "",
        f"{len(checked.problems):,} bad" if checked.problems else "",
    ]
    left_out = [reason for reason in left_out if reason]
    text += f"; left out: {', '.join(left_out)}" if left_out else ""
    if checked.shortened:
        turns = sum(sample.turns_dropped for sample in checked.shortened)
        text += f"; shortened: {len(checked.shortened):,}, by {turns:,} turns at the front"
    if checked.pages_left_out:
        text += f"; {checked.pages_left_out:,} pages beyond data.pages.first left out"
    if checked.markup:
        text += f"; markup trained as text: {name_counts(checked.markup)}"
    if checked.unread:
        text += f"; not read: {name_counts(checked.unread)}"
    return text


def describe_train_on(data: Data) -> str:
    """What to say of `data.train_on`; empty where every reply is trained."""
    if data.train_on == "all":
        return ""
    over = f", and data.labels: {data.labels} does not hold" if data.labels != "assistant" else ""
    return (
        "only the last reply of each conversation is trained, and evaluated by the loss (data.train_on: last): those "
        f"before it are context{over}"
    )


def describe_long(checked: Checked, rules: Rules, seq_length: int, *, pages: bool = False) -> str:
    """What to say of samples that are longer than what the model was trained on; empty where there are none.

    Args:
        rules: that the samples were checked by.
        seq_length: tokens, of the model's configuration.
        pages: whether files may have become several images (`data.pages`).
    """
    count = int((checked.lengths > seq_length).sum())
    if not count:
        return ""
    longest = int(checked.lengths.argmax())
    pictures = int(checked.images[longest])
    keys = [*(["data.pages"] if pages else []), *(["data.views"] if rules.views is not None else [])]
    cost = f", {pictures * (rules.n_queries + 2):,} of them for {pictures:,} pictures ({', '.join(keys)})"
    return (
        f"{count:,} samples are longer than the model's seq_length of {seq_length:,} tokens, the longest has "
        f"{int(checked.lengths[longest]):,}{cost if keys and pictures else ''}: beyond it the model stretches "
        "positions in use and in evaluation, and not in training (both as published): it does not learn these as it "
        f"will read them, and their losses in training and evaluation differ; data.max_length: {seq_length} with "
        "data.on_long: drop leaves them out"
    )


def note_on_long(checked: Checked, seq_length: int) -> str:
    """What a reader of an evaluation's loss has to know; empty where no evaluation sample is beyond `seq_length`."""
    count = int((checked.lengths > seq_length).sum())
    if not count:
        return ""
    return (
        f"{count:,} of the {len(checked.kept):,} evaluation samples are longer than the model's seq_length of "
        f"{seq_length:,} tokens. Their loss is computed with stretched positions, as the model is used; training "
        "computes without: on these, losses of training and evaluation are not of the same computation."
    )


def name_counts(counts: Mapping[str, int]) -> str:
    """`notes (12 rows), score (3 rows)`, the most frequent first; data may have any number of columns."""
    shown = [f"{_short(name)} ({count:,} {'row' if count == 1 else 'rows'})" for name, count in counts.items()]
    more = f" and {len(shown) - _SHOWN_NAMES:,} more" if len(shown) > _SHOWN_NAMES else ""
    return ", ".join(shown[:_SHOWN_NAMES]) + more


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "…"


def lines_left_out(checked: Checked) -> Iterator[str]:
    """A JSON line for each row that is not trained on, or not whole, with its reason."""
    for problem in checked.problems:
        yield json.dumps({"origin": str(problem.origin), "reason": str(problem)}, ensure_ascii=False) + "\n"
    for long in checked.dropped_long:
        yield json.dumps({"origin": str(long.origin), "reason": f"too long: {long.tokens} tokens{long.cost}"}) + "\n"
    for shortened in checked.shortened:
        turns = shortened.turns_dropped
        reason = f"shortened: trained without its first {turns} turns"
        yield json.dumps({"origin": str(shortened.origin), "reason": reason, "turns_dropped": turns}) + "\n"


def count_rows(checked: Checked) -> dict[str, int]:
    """Rows kept, left out and shortened, for run.json."""
    return {
        "total": checked.total,
        "kept": len(checked.kept),
        "too_long": len(checked.dropped_long),
        "bad": len(checked.problems),
        "shortened": len(checked.shortened),
        "turns_dropped": sum(sample.turns_dropped for sample in checked.shortened),
        **({"pages_left_out": checked.pages_left_out} if checked.pages_left_out else {}),
    }


def problem_kinds(problems: Iterable[BadRow]) -> list[tuple[str, int]]:
    """Problems counted by kind, the most frequent first: field and reason without what is of one row only."""
    kinds = Counter(_kind(problem) for problem in problems)
    return kinds.most_common()


def _kind(problem: BadRow) -> str:
    # Without indices: images[0] and images[1] are one kind.
    text = re.sub(r"\[\d+\]", "[]", problem.field) + ": " + _DETAIL.sub("…", problem.reason)
    return text if len(text) <= _LONGEST_KIND else text[:_LONGEST_KIND] + "…"


class SourceCount(NamedTuple):
    """Numbers of a source's samples: all, those that are kept, and those that an epoch draws by its weight, on
    average."""

    total: int
    kept: int
    weight: float
    an_epoch: float
    tokens: int

    @property
    def times(self) -> str:
        """`, x 0.1 = 0.4 an epoch`; empty for a weight of 1."""
        return "" if self.weight == 1 else f", x {self.weight:g} = {self.drawn} an epoch"

    @property
    def drawn(self) -> str:
        """Samples of an epoch, with two decimals where it is no whole number."""
        return f"{self.an_epoch:,.2f}".rstrip("0").rstrip(".")


def describe_sources(sources: Sequence[Source], samples: Samples, checked: Checked, seed: int) -> list[str]:
    """A line for each source: how many of its rows are kept, and how many an epoch draws.

    Args:
        sources: of the recipe, those that were opened.
        seed: of the run.
    """
    lines = [
        f"{count.kept:,} of {count.total:,} {source.path} ({source.format}){_part(source)}{count.times}"
        for source, count in zip(sources, count_sources(samples, checked), strict=True)
    ]
    draws = checked.epochs(seed)
    if draws is not None:
        share = sum(draws.shares)
        said = f"each epoch draws {draws.size:,} samples, other rows of the sources whose weight is no whole number"
        if share != draws.size:
            said += ", one of them at times from any source to make the epochs equally long"
        lines.append(said)
    return lines


def _part(source: Source) -> str:
    return "" if source.part is None else f", part to {source.part.take} (by {source.part.by})"


def count_sources(samples: Samples, checked: Checked) -> list[SourceCount]:
    """Of each source in order; tokens are those of the kept samples, once each."""
    counts = []
    for number, (indices, weight) in enumerate(zip(samples.ranges, checked.weights, strict=True)):
        places = checked.source == number
        kept = int(np.count_nonzero(places))
        # Exactly where each epoch draws; else as `Checked.weighted_indices` does.
        whole = int(weight) * kept + round((weight - int(weight)) * kept)
        an_epoch = float(Fraction(repr(float(weight))) * kept) if checked.redraws else whole
        counts.append(SourceCount(len(indices), kept, weight, an_epoch, int(checked.lengths[places].sum())))
    return counts
