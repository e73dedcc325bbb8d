"""A run folder -> `report.html`: what was trained on what, the curves, and replies before and after training.

    report = write_report(Path("runs/docvqa"))

One file to look at, mail or print: without scripts and external files, light or dark as the reader's system. It is
written from whatever the folder holds, also during the run or after it was killed, and lists what is missing or
damaged. Data is shown as text, never as markup.

It reads `run.json`, `metrics.jsonl`, `recipe.yaml` and `predictions.jsonl`. These keys of `run.json` have a section;
all others are listed as they are:

    status          "running", "finished", "interrupted", "failed"
    started         text, finished: text, wall_seconds: seconds, parts: into which the run was cut
    trained_on      {"tokens": int, "images": int, ...}
    model           path or name of the base
    parameters      {component: {"trained": int, "total": int}}
    rows            {"train": {"kept": int, "bad": int, ...}, "eval": {...}}
    phases          {"load": {"seconds": ..., "times": ...}, ...}, in the order in which they began
    packing_efficiency  share of the packs' positions that hold tokens, 0 to 1
    environment     {"versions": {package: version}, ...}
    notes           warnings for the reader of the numbers, a list of sentences
    score           the task's: {"metric": text, "questions": int, "before": float, "after": float,
                    "sources": {name: {"questions": int, "before": float, "after": float}}, "groups": the same}
    identity        without its `recipe`, which is shown as a whole
"""

import json
import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from finetune.errors import MissingFileError
from finetune.files.atomic_writes import write_text
from finetune.quantities import (
    format_bytes,
    format_count,
    format_duration,
    format_loss,
    is_number,
)
from finetune.report.charts import LARGEST, Series, line_chart, smooth
from finetune.report.logged_scores import parts_of_scores
from finetune.report.page import flatten, page, show, table, tiles
from finetune.report.phases import phases_table
from finetune.report.predictions import pair_rows, predictions_section
from finetune.report.scores import score_charts, score_title, scores_section
from finetune.run.json_values import NON_FINITE
from finetune.run.left_out import LEFT_OUT, describe_left_out
from finetune.run.saved_step import saved_step

REPORT = "report.html"
LARGEST_STEP = 10**12  # beyond any run
FEW_POINTS = 10  # a curve of at most this many points is not smoothed

Curve = list[tuple[float, float]]  # (step, value), steps ascending; values may be NaN or infinite

# Logged key, title, unit, whether the axis starts at 0. The loss is drawn separately.
_CHARTS = (
    ("learning_rate", "Learning rate", "of the first parameter group", True),
    ("grad_norm", "Gradient norm", "before clipping", True),
    ("tokens_per_second", "Throughput", "tokens/s", True),
    ("images_per_second", "Images", "images/s", True),
)
_OWN_PLACE = (
    *("status", "started", "finished", "wall_seconds", "model", "parameters", "rows"),
    *("packing_efficiency", "environment", "notes", "identity", "score", "phases", "left_out"),
    *("parts", "trained_on"),
)


def write_report(run: str | Path) -> Path:
    """Write `report.html` into a run folder; an earlier report is replaced atomically.

    Returns:
        The report's path.

    Raises:
        MissingFileError: there is no such folder.
        OSError: the report cannot be written; an earlier one is unchanged.
    """
    run = Path(run)
    if not run.is_dir():
        raise MissingFileError(f"there is no run folder {str(run)!r} to report on; give a recipe's `output`.")
    path = run / REPORT
    write_text(path, _render(run))
    return path


def _render(run: Path) -> str:
    missing: list[str] = []
    facts = _read_run(run / "run.json", missing)
    curves = read_curves(_read_records(run / "metrics.jsonl", missing))
    recipe = _read_text(run / "recipe.yaml", missing)
    rows = pair_rows(_read_records(run / "predictions.jsonl", missing))
    name = run.resolve().name
    sections = [
        _headline(name, facts, curves),
        _notes(facts.get("notes"), missing),
        scores_section(facts.get("score")),
        _curves(curves),
        predictions_section(rows, run) if rows else "",
        _composition(facts),
        f'<h2>Recipe</h2>\n<div class="panel long"><pre>{show(recipe)}</pre></div>' if recipe else "",
        _environment(facts),
    ]
    return page(f"{name}: fine-tuning report", "\n".join(section for section in sections if section))


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_text(path: Path, missing: list[str]) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        missing.append(f"{path.name}: there is none")
    except OSError as error:
        missing.append(f"{path.name}: it cannot be read ({error.strerror})")
    return ""


def _read_run(path: Path, missing: list[str]) -> dict[str, Any]:
    text = _read_text(path, missing)
    if not text:
        return {}
    try:
        facts = json.loads(text, parse_int=_whole_number)
    except (ValueError, RecursionError):
        missing.append(f"{path.name}: it is damaged and was left out")
        return {}
    if not isinstance(facts, dict):
        missing.append(f"{path.name}: it holds no object and was left out")
        return {}
    return facts


def _read_records(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file. Damaged lines are counted and left out."""
    records, bad = [], []
    # At \n only: strings may hold other line separators.
    lines = _read_text(path, missing).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_int=_whole_number)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            bad.append(number)
    if bad == [len(lines)]:
        missing.append(f"{path.name}: its last line is torn and was left out")
    elif bad:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        missing.append(f"{path.name}: {len(bad)} damaged line(s) left out ({shown})")
    return records


def read_curves(records: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Logged key -> its values over the steps. NaN and infinities are values; null and text are not.

    A record whose step is not beyond the previous one is from a run that resumed from an earlier checkpoint: it
    replaces what was logged from that step on.
    """
    curves: dict[str, Curve] = {}
    for record in records:
        step = record.get("step")
        if not is_number(step) or not 0 <= step <= LARGEST_STEP:
            continue
        for key, value in record.items():
            value = NON_FINITE.get(value, value) if isinstance(value, str) else value
            if key == "step" or not is_number(value):
                continue
            curve = curves.setdefault(key, [])
            while curve and curve[-1][0] >= step:
                curve.pop()
            curve.append((step, value))
    return curves


def _whole_number(digits: str) -> float:
    """An integer of JSON, which may have any length; beyond 18 digits as a float, so that arithmetic works."""
    return int(digits) if len(digits) < 19 else float(digits)


def _finite(curve: Curve) -> Curve:
    """Without NaN, infinities, and values too large for a chart."""
    return [(step, value) for step, value in curve if abs(value) <= LARGEST]


# --- sections --------------------------------------------------------------------------------------------------------


def _headline(name: str, facts: Mapping[str, Any], curves: Mapping[str, Curve]) -> str:
    status = show(facts.get("status") or "status unknown")
    kind = status if status in ("finished", "failed", "interrupted") else ""
    times = [f"{key} {show(_moment(facts[key]))}" for key in ("started", "finished") if facts.get(key)]
    base = f"Trained from <strong>{show(facts['model'])}</strong>" if facts.get("model") else ""
    kept = _kept_rows(facts.get("rows"))
    if kept is not None:
        base = f"{base or 'Trained'} on {format_count(kept)} rows"
    lines = [
        f"<h1>{show(name)}</h1>",
        f"<p>{base}</p>" if base else "",
        f'<p class="muted"><span class="status {kind}">{status}</span> {" · ".join(times)}</p>',
        tiles(_numbers(facts, curves)),
    ]
    return "\n".join(line for line in lines if line)


def _moment(value: Any) -> str:
    """An ISO 8601 time without its seconds; anything else unchanged."""
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return str(value)
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".rstrip()


def _kept_rows(rows: Any) -> float | None:
    train = rows.get("train") if isinstance(rows, dict) else None
    kept = train.get("kept") if isinstance(train, dict) else None
    return kept if is_number(kept) else None


def _numbers(facts: Mapping[str, Any], curves: Mapping[str, Curve]) -> Iterable[tuple[str, str, str]]:
    """The tiles: name, value, remark."""
    if loss := curves.get("loss"):
        yield ("Loss, first → last", _first_to_last(loss), "")
    if evaluated := curves.get("eval_loss"):
        best = min(_finite(evaluated), key=lambda point: point[1], default=(evaluated[-1][0], math.nan))
        more = f"at step {best[0]:g}"
        if len(evaluated) > 1:
            more += f"; first {format_loss(evaluated[0][1])}, last {format_loss(evaluated[-1][1])}"
        yield ("Best evaluation loss", format_loss(best[1]), more)
    for key in parts_of_scores(curves):
        if key != "eval_loss":
            yield (score_title(key), _first_to_last(curves[key]), "first → last" if len(curves[key]) > 1 else "")
    steps = max((curve[-1][0] for curve in curves.values()), default=None)
    epoch = _finite(curves.get("epoch", []))
    if steps is not None:
        yield ("Optimizer steps", f"{steps:,.0f}", f"epoch {epoch[-1][1]:.2f}" if epoch else "")
    if (saved := saved_step(facts)) is not None:
        yield ("Saved step", f"{saved:,}", "; ".join(_scores_at(saved, curves)))
    if is_number(facts.get("wall_seconds")):
        parts = facts.get("parts")
        more = f"in {parts} parts" if is_number(parts) and parts > 1 else ""
        yield ("Wall time", format_duration(facts["wall_seconds"]), more)
    trained = facts.get("trained_on")
    if isinstance(trained, dict) and all(is_number(trained.get(key)) for key in ("tokens", "images")):
        yield ("Trained on", f"{format_count(trained['tokens'])} tokens", f"{format_count(trained['images'])} images")
    rates = {key: _finite(curves.get(key, [])) for key in ("tokens_per_second", "images_per_second")}
    if tokens := rates["tokens_per_second"]:
        images = rates["images_per_second"]
        more = f"{format_count(median(value for _, value in images))} images/s; medians" if images else "median"
        yield ("Throughput", f"{format_count(median(value for _, value in tokens))} tokens/s", more)
    if memory := _finite(curves.get("peak_memory_bytes", [])):
        yield ("Peak memory", format_bytes(max(value for _, value in memory)), "of one device")


def _scores_at(step: int, curves: Mapping[str, Curve]) -> Iterable[str]:
    """`eval loss 0.9876`, for each score that was logged at a step."""
    for key in parts_of_scores(curves):
        for at, value in curves[key]:
            if at == step:
                yield f"{key.replace('_', ' ')} {format_loss(value)}"


def _first_to_last(curve: Curve) -> str:
    ends = [curve[0], curve[-1]] if len(curve) > 1 else curve
    return " → ".join(format_loss(value) for _, value in ends)


def _notes(notes: Any, missing: list[str]) -> str:
    if not isinstance(notes, list):
        notes = [notes] if notes else []

    def panel(kind: str, title: str, lines: Iterable[object]) -> str:
        items = "".join(f"<li>{show(line)}</li>" for line in lines)
        return f'<div class="panel notes {kind}"><strong>{title}</strong><ul>{items}</ul></div>'

    panels = [panel("", "Before you read the numbers", notes)] if notes else []
    panels += [panel("missing", "Missing from this report", missing)] if missing else []
    return "\n".join(panels)


def _curves(curves: Mapping[str, Curve]) -> str:
    charts = [_loss_chart(curves)]
    for key, title, unit, from_zero in _CHARTS:
        if points := _finite(curves.get(key, [])):
            jagged = key != "learning_rate" and len(points) > FEW_POINTS
            drawn = _raw_and_smooth(points) if jagged else [Series(title, points)]
            charts.append(line_chart(title, drawn, unit=unit, from_zero=from_zero))
    charts += score_charts({key: _finite(curve) for key, curve in curves.items()})
    charts = [chart for chart in charts if chart]
    bad = {key: len(curve) - len(_finite(curve)) for key, curve in curves.items()}
    remarks = [f"{key}: {count} value(s) are not finite and not drawn" for key, count in bad.items() if count]
    remark = f'<p class="muted">{show("; ".join(remarks))}</p>' if remarks else ""
    return f'<h2>Curves</h2>\n{remark}<div class="charts">{"".join(charts)}</div>' if charts or remarks else ""


def _loss_chart(curves: Mapping[str, Curve]) -> str:
    loss, evaluated = (_finite(curves.get(key, [])) for key in ("loss", "eval_loss"))
    if not loss and not evaluated:
        return ""
    drawn = _raw_and_smooth(loss) if len(loss) > FEW_POINTS else [Series("training", loss, "marks")]
    if evaluated:
        drawn.append(Series("evaluation", evaluated, "marks", "b"))
    return line_chart("Loss", drawn, unit="nats per supervised token")


def _raw_and_smooth(points: Curve) -> list[Series]:
    return [Series("each log", points, "dots"), Series("smoothed", smooth(points), "line")]


def _composition(facts: Mapping[str, Any]) -> str:
    """The trained parameters and the rows."""
    panels = []
    if isinstance(parameters := facts.get("parameters"), dict):
        lines: list[tuple[str, ...]] = []
        sums: list[float] = [0, 0]
        for component, count in parameters.items():
            trained, total = (count.get(key) if isinstance(count, dict) else None for key in ("trained", "total"))
            if is_number(trained) and is_number(total):
                sums = [sums[0] + trained, sums[1] + total]
                lines.append((component, *_share(trained, total)))
        if lines:
            lines.append(("all", *_share(*sums)))
            head = ("component", "trained", "of", "share")
            panels.append(_panel("Parameters", table(lines, head=head, numeric=(1, 2, 3))))
    data = _rows_table(facts.get("rows"))
    if is_number(packing := facts.get("packing_efficiency")):
        data += table([("packing efficiency", f"{packing:.1%}")], numeric=(1,))
    rows, met = (found if isinstance(found := facts.get(key), dict) else {} for key in ("rows", "left_out"))
    if said := describe_left_out(rows, met):
        data += f'<p class="muted">Left out: {show("; ".join(said))}. {LEFT_OUT} beside this page lists them.</p>'
    if data:
        panels.append(_panel("Rows", data))
    return f'<h2>What was trained</h2>\n<div class="columns">{"".join(panels)}</div>' if panels else ""


def _rows_table(rows: Any) -> str:
    """A line for each part of the data, a column for each count."""
    if not isinstance(rows, dict) or not rows:
        return ""
    parts = {name: counts for name, counts in rows.items() if isinstance(counts, dict)}
    if len(parts) < len(rows):
        return table(flatten(rows), numeric=(1,))
    columns = list(dict.fromkeys(key for counts in parts.values() for key in counts))
    lines = [
        (name, *(f"{count:,}" if is_number(count := counts.get(key)) else str(count or "") for key in columns))
        for name, counts in parts.items()
    ]
    head = ("", *(key.replace("_", " ") for key in columns))
    return table(lines, head=head, numeric=range(1, len(head)))


def _share(trained: float, total: float) -> tuple[str, str, str]:
    return format_count(trained), format_count(total), f"{trained / total:.2%}" if total else ""


def _environment(facts: Mapping[str, Any]) -> str:
    panels = []
    if times := phases_table(facts.get("phases")):
        panels.append(_panel("Where the time went", times))
    environment = facts.get("environment")
    if environment:
        lines = [(key.removeprefix("versions."), text) for key, text in flatten(environment)]
        panels.append(_panel("Environment", table(lines)))
    others = {key: value for key, value in facts.items() if key not in _OWN_PLACE}
    if isinstance(identity := facts.get("identity"), dict):
        others["identity"] = {key: value for key, value in identity.items() if key != "recipe"}
    if lines := flatten(others):
        panels.append(_panel("Also in run.json", table(lines)))
    return f'<h2>Environment</h2>\n<div class="columns">{"".join(panels)}</div>' if panels else ""


def _panel(title: str, body: str) -> str:
    return f'<div class="panel"><strong>{show(title)}</strong>{body}</div>'
