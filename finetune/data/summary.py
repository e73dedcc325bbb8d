"""Summaries of checked data, for the terminal, run.json and the list of rows left out."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from finetune.data.checking import Checked
from finetune.data.sample import BadRow
from finetune.data.samples import Samples

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
        f"({checked.supervised.sum() / max(lengths.sum(), 1):.1%} trained), {int(checked.images.sum()):,} images"
    )
    left_out = [
        f"{len(checked.dropped_long):,} too long" if checked.dropped_long else "",
        f"{len(checked.problems):,} bad" if checked.problems else "",
    ]
    left_out = [reason for reason in left_out if reason]
    text += f"; left out: {', '.join(left_out)}" if left_out else ""
    if checked.shortened:
        turns = sum(sample.turns_dropped for sample in checked.shortened)
        text += f"; shortened: {len(checked.shortened):,}, by {turns:,} turns at the front"
    if checked.markup:
        text += f"; markup trained as text: {name_counts(checked.markup)}"
    if checked.unread:
        text += f"; not read: {name_counts(checked.unread)}"
    return text


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
        yield json.dumps({"origin": str(long.origin), "reason": f"too long: {long.tokens} tokens"}) + "\n"
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
    """Numbers of a source's samples: all, those that are kept, and those that an epoch draws by its weight."""

    total: int
    kept: int
    weight: float
    an_epoch: int
    tokens: int


def count_sources(samples: Samples, checked: Checked) -> list[SourceCount]:
    """Of each source in order; tokens are those of the kept samples, once each."""
    counts = []
    for number, (indices, weight) in enumerate(zip(samples.ranges, checked.weights, strict=True)):
        places = checked.source == number
        kept = int(np.count_nonzero(places))
        # As `Checked.weighted_indices` draws them.
        an_epoch = int(weight) * kept + round((weight - int(weight)) * kept)
        counts.append(SourceCount(len(indices), kept, weight, an_epoch, int(checked.lengths[places].sum())))
    return counts
