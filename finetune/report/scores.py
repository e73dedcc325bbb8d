"""The task's score in a run's report: before and after training, over all questions and for each source and group."""

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from finetune.quantities import format_loss, is_number
from finetune.report.charts import Colour, Points, Series, line_chart
from finetune.report.logged_scores import parts_of_scores
from finetune.report.page import readable, show, table

_WHOLE: Colour = "b"  # as the evaluation's loss
_PARTS: tuple[Colour, ...] = tuple(colour for colour in get_args(Colour) if colour != _WHOLE)
_HEAD = ("", "questions", "before training", "after training", "change")


def scores_section(score: Any) -> str:
    """The section's HTML, from the score in `run.json` (`TaskScore.added_to`); empty if it has none."""
    if not isinstance(score, dict):
        return ""
    lines = [_line("all questions", score)]
    for kind, title in (("sources", "source"), ("groups", "group")):
        parts = score.get(kind)
        if isinstance(parts, dict):
            lines += [_line(f"{title} {name}", part) for name, part in parts.items() if isinstance(part, dict)]
    intro = "After training is the score of the result, which may be an earlier checkpoint than the last."
    return (
        f'<h2>Score: {show(score.get("metric") or "of the task")}</h2>\n<p class="muted">{intro}</p>\n'
        f'<div class="panel">{table(lines, head=_HEAD, numeric=range(1, len(_HEAD)))}</div>'
    )


def _line(name: str, score: Mapping[str, Any]) -> tuple[str, ...]:
    questions, before, after = (score.get(key) for key in ("questions", "before", "after"))
    change = f"{after - before:+.4f}" if is_number(before) and is_number(after) else ""
    values = (format_loss(value) if is_number(value) else "" for value in (before, after))
    return name, f"{questions:,}" if is_number(questions) else "", *values, change


def score_title(key: str) -> str:
    """`Evaluation: anls`, of the logged key eval_anls."""
    return "Evaluation: " + readable(key.removeprefix("eval_").replace("_", " "))


def score_charts(curves: Mapping[str, Points]) -> Iterable[str]:
    """A chart for each logged score except the loss, with its sources and groups as far as there are colours for them.

    Args:
        curves: logged key -> (step, value), finite.
    """
    for key, parts in parts_of_scores(curves).items():
        if key == "eval_loss":
            continue
        drawn = [Series("all questions" if parts else key, curves[key], "marks", _WHOLE)]
        drawn += [
            Series(readable(name), curves[part], "marks", colour)
            for (part, name), colour in zip(parts.items(), _PARTS, strict=False)
        ]
        if any(series.points for series in drawn):
            yield line_chart(score_title(key), drawn, unit="score")
        for part in list(parts)[len(_PARTS) :]:
            if curves[part]:
                yield line_chart(score_title(part), [Series(part, curves[part], "marks", _WHOLE)], unit="score")
