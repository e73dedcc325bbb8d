"""A section of the report: replies before and after training, row by row beside the target."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.quantities import format_loss, is_number
from finetune.report.images import draw_pair, image_tag, pair_legend, thumbnail
from finetune.report.page import show
from qwenvl.images.images import ImageAccess
from qwenvl.text.grounding import parse_grounding

MAX_ROWS = 100  # shown; some 40 kB each
MAX_DIFF_WORDS = 600  # of a text; the time of a comparison grows with the square
ALIKE = 0.5  # minimum share of common words; below it, nearly everything would be marked

WHEN = ("before", "after")

# See `finetune.data.shown_rows`.
CHOSEN = (
    "These are the first rows of the evaluation data (of the sample, where one is scored), one of each document as "
    "far as there are enough, its sources in turn: chosen before training, whatever the replies."
)
UNBOUNDED = ("cider_d",)
"""Metrics without a score that means "right"."""

# Numbers, words of scripts with spaces, runs of white space, and every other character by itself.
_WORDS = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|\s+|.", re.DOTALL)


@dataclass
class Row:
    """An evaluation row and the replies to it.

    Attributes:
        origin, question, target: as in the records.
        images: paths in the run folder.
        others: further right answers.
        replies: the replies "before" and "after" training; either may be missing.
        scores: the score of each reply, where there is a task.
        metric: the task's metric; empty without a task.
        source: name of the row's source; empty where there is one source.
    """

    origin: str
    question: str
    target: str
    images: tuple[str, ...]
    others: tuple[str, ...] = ()
    replies: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    metric: str = ""
    source: str = ""

    def matches(self, when: str) -> bool:
        """Whether the reply equals the target, apart from white space around it."""
        return self.replies[when].strip() == self.target.strip()

    def is_judged(self, when: str) -> bool:
        """Whether the task's score tells if the reply is right."""
        return when in self.scores and self.metric not in UNBOUNDED

    def is_right(self, when: str) -> bool:
        """Whether the reply has the full score; without a score, whether it equals the target."""
        return self.scores[when] > 1 - 1e-9 if self.is_judged(when) else self.matches(when)


def pair_rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Group the records of `predictions.jsonl` by row, in the order of each row's first record.

    A record has `when` ("before" | "after"), `origin`, `question`, `images` (paths in the run folder), `target` and
    `prediction`; with a task also `others` (further right answers), `score` and `metric`; with several sources also
    `source`. Of two records on the same row at the same time the later one counts.
    """
    rows: dict[tuple[str, str, str], Row] = {}
    for record in records:
        origin, question, target = (_text(record.get(key)) for key in ("origin", "question", "target"))
        images = record.get("images")
        paths = tuple(map(str, images)) if isinstance(images, list) else ()
        others = record.get("others")
        answers = tuple(map(str, others)) if isinstance(others, list) else ()
        row = rows.setdefault((origin, question, target), Row(origin, question, target, paths, answers))
        row.metric, row.source = _text(record.get("metric")), _text(record.get("source"))
        if record.get("when") in WHEN:
            row.replies[record["when"]] = _text(record.get("prediction"))
            score = record.get("score")
            if is_number(score):
                row.scores[record["when"]] = score
    return list(rows.values())


def predictions_section(rows: Sequence[Row], run: Path) -> str:
    """The section's HTML: how many replies are right, how the rows were chosen, and a panel for each row."""
    counts = []
    for when in WHEN:
        answered = [row for row in rows if when in row.replies]
        if answered:
            counts.append(f"{sum(row.is_right(when) for row in answered)} of {len(answered)} {when}")
    counted = "Right" if any(row.is_judged(when) for row in rows for when in WHEN) else "Exact matches"
    intro = [f"{counted}: {', '.join(counts)} training." if counts else "No replies.", CHOSEN]
    intro.append(
        "In a reply, <mark>marked</mark> is what the target does not say, <del>struck</del> what the reply leaves out."
    )
    if len(rows) > MAX_ROWS:
        intro.append(f"The first {MAX_ROWS} of {len(rows)} rows are shown; all are in predictions.jsonl.")
    panels = [_panel(row, run) for row in rows[:MAX_ROWS]]
    return f'<h2>Replies before and after</h2>\n<p class="muted">{" ".join(intro)}</p>\n' + "\n".join(panels)


def compare(target: str, reply: str) -> str:
    """The reply as HTML, compared with the target: `<mark>` on text that the target lacks, `<del>` on missing text.

    Texts with little in common, or too long to compare, are shown without marks.
    """
    wanted, said = _WORDS.findall(target.strip()), _WORDS.findall(reply.strip())
    if max(len(wanted), len(said)) > MAX_DIFF_WORDS:
        return show(reply)
    if _likeness(wanted, said) < ALIKE:
        return show(reply)
    pieces = []
    matcher = difflib.SequenceMatcher(None, wanted, said, autojunk=False)
    for operation, start, end, said_start, said_end in matcher.get_opcodes():
        missing, extra = show("".join(wanted[start:end])), show("".join(said[said_start:said_end]))
        if operation == "equal":
            pieces.append(extra)
        else:
            pieces.append(f"<del>{missing}</del>" if missing.strip() else "")
            pieces.append(f"<mark>{extra}</mark>" if extra else "")
    return "".join(pieces)


def _likeness(wanted: list[str], said: list[str]) -> float:
    """0 to 1: twice the number of common words in the same order, over the number of words of both."""
    ours, theirs = ([word for word in text if not word.isspace()] for text in (wanted, said))
    return difflib.SequenceMatcher(None, ours, theirs, autojunk=False).ratio()


# --- one row ---------------------------------------------------------------------------------------------------------


def _panel(row: Row, run: Path) -> str:
    thumbnails = [thumbnail(path, ImageAccess(root=run)) for path in row.images]
    regions = {when: parse_grounding(reply).regions for when, reply in row.replies.items()}
    regions["target"] = parse_grounding(row.target).regions
    # The markup of a box does not name its image, so boxes are drawn only where there is one.
    single = thumbnails[0] if len(thumbnails) == 1 and isinstance(thumbnails[0], Image.Image) else None
    boxed = single if any(regions.values()) else None
    images = ""
    if boxed is None and thumbnails:
        images = f'<div class="images">{"".join(map(image_tag, thumbnails))}</div>'
    asked = (
        f'<div><div class="name">Question</div>{_said(show(row.question))}'
        f'<div class="name">Target</div>{_said(show(row.target))}{_others(row)}</div>'
    )
    sides = []
    for when in WHEN:
        drawn = ""
        if boxed is not None and when in row.replies:
            pair = regions["target"], regions[when]
            drawn = image_tag(draw_pair(boxed, *pair)) + pair_legend(*pair)
        sides.append(_side(row, when, drawn))
    return (
        f'<article class="panel row"><header><span>{show(row.origin)}</span><span>{show(row.source)}</span></header>'
        f'<div class="asked{"" if images else " bare"}">{images}{asked}</div>'
        f'<div class="sides">{"".join(sides)}</div></article>'
    )


def _side(row: Row, when: str, drawn: str) -> str:
    name = f"{when.capitalize()} training"
    if when not in row.replies:
        return f'<section><div class="name">{name}</div><p class="nothing">No reply was recorded.</p></section>'
    reply = row.replies[when]
    is_right = row.is_right(when)
    kind, said = ("match", show(reply)) if is_right else ("differs", compare(row.target, reply))
    if not row.is_judged(when):
        badge = _badge("match", "✓ exact match") if is_right else _badge("differs", "differs")
    elif is_right:
        badge = _badge("match", "✓ right")
    else:
        badge = _badge("differs", "partly right") if row.scores[when] > 0 else _badge("wrong", "✗ wrong")
    if when in row.scores:
        badge += _badge("", f"score {format_loss(row.scores[when])}")
    if not reply.strip():
        said = '<span class="muted">(empty)</span>'
    return f'<section class="{kind}"><div class="name">{name}{badge}</div>{drawn}{_said(said)}</section>'


def _badge(kind: str, text: str) -> str:
    return f'<span class="{f"badge {kind}".rstrip()}">{text}</span>'


def _others(row: Row) -> str:
    return f'<p class="muted">also right: {show("; ".join(row.others))}</p>' if row.others else ""


def _said(html: str) -> str:
    return f'<p class="said" dir="auto">{html}</p>'


def _text(value: Any) -> str:
    return "" if value is None else str(value)
