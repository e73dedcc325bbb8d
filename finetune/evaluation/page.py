"""The page of an evaluation, `evaluation.html`: one file without scripts that loads nothing.

It shows the score with its interval and groups, the worst rows and, where two models are compared, the rows on which
they differ most; with images, and the gold and predicted boxes on them. Data is always shown as text, never as markup.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.evaluation.detection_scores import SHARES, share_texts
from finetune.evaluation.questions import Question
from finetune.evaluation.results import unread_lines
from finetune.files.atomic_writes import write_text
from finetune.quantities import format_duration, format_loss
from finetune.report.images import draw_pair, image_tag, pair_legend, thumbnail
from finetune.report.page import flatten, page, show, table, tiles
from finetune.report.predictions import compare
from qwenvl.text.boxes import box_markup
from qwenvl.text.grounding import Region, parse_grounding

PAGE = "evaluation.html"
WORST = 24  # rows shown of the lowest scores, some 40 kB each
CHANGED = 12  # of those that got better, and of those that got worse
LISTED = 50  # unreadable images and rows left out

Records = Sequence[Mapping[str, Any]]


def write_evaluation_page(
    folder: Path,
    results: Mapping[str, Any],
    questions: Sequence[Question],
    records: Records,
    compared: Records | None = None,
) -> Path:
    """Write `evaluation.html`; an earlier page is replaced atomically.

    Args:
        folder: of the evaluation.
        results: as in `results.json`.
        questions, records: all of them, in the same order.
        compared: the records of the model that is compared with.

    Returns:
        The page's path.

    Raises:
        PathError: the page cannot be written.
    """
    sections = [
        _headline(results),
        _notes(results),
        _sources(results),
        _fields(results),
        _groups(results),
        _detection(results),
        _changed(questions, records, compared) if compared and "score" in results else "",
        _worst(questions, records) if "score" in results else _first(questions, records),
        _facts(results),
    ]
    title = f"{results['task']}: {results['model']}"
    path = folder / PAGE
    write_text(path, page(title, "\n".join(section for section in sections if section)))
    return path


def _headline(results: Mapping[str, Any]) -> str:
    numbers = []
    if "score" in results:
        numbers.append((results["metric"], format_loss(results["score"]), _interval(results["interval"])))
    if compared := results.get("compared"):
        numbers.append(("Compared model", format_loss(compared["score"]), compared["model"]))
        remark = f"{_interval(compared['difference_interval'], '+')}; paired"
        numbers.append(("Difference", f"{compared['difference']:+.4f}", remark))
        numbers.append(("Questions better, worse", f"{compared['better']:,}, {compared['worse']:,}", ""))
    of = f"of {results['of']:,}" if results["questions"] < results["of"] else ""
    numbers.append(("Questions", f"{results['questions']:,}", of))
    if speed := results.get("speed"):
        remark = f"{speed['replies']:,} replies in {format_duration(speed['seconds'])}"
        numbers.append(("Speed", f"{speed['examples_per_second']:.2f} examples/s", remark))
    hidden = ""
    if "submission" in results:
        hidden = f"<p>The answers are hidden: <strong>{show(results['submission'])}</strong> holds the replies.</p>"
    return (
        f"<h1>{show(results['task'])}</h1>\n<p>Evaluated: <strong>{show(results['model'])}</strong></p>\n"
        f"{hidden}{tiles(numbers)}"
    )


def _interval(interval: Sequence[float], sign: str = "") -> str:
    low, high = (f"{end:{sign}.4f}" for end in interval)
    return f"95%: {low} to {high}"


def _notes(results: Mapping[str, Any]) -> str:
    lines = [f"It was asked {results['settings']['asked']}."]
    lines += list(results["notes"])
    wrong = ", and count as wrong." if "score" in results else "."
    lines += [said + wrong for said in unread_lines(results["unread"], results.get("compared"))]
    if cut := results["cut"]:
        lines.append(f"{cut:,} replies end at the limit of {results['settings']['max_new_tokens']} new tokens.")
    unreadable, left_out = results["unreadable"], results["left_out"]
    if unreadable:
        lines.append(f"{len(unreadable):,} questions are on images that cannot be read, and count as wrong:")
        lines += [f"{one['origin']}: {one['unreadable']}" for one in unreadable[:LISTED]]
    if left_out:
        lines.append(f"{len(left_out):,} rows cannot be asked and are left out of the score:")
        lines += left_out[:LISTED]
    items = "".join(f"<li>{show(line)}</li>" for line in lines)
    return f'<div class="panel notes"><strong>Before you read the numbers</strong><ul>{items}</ul></div>'


def _sources(results: Mapping[str, Any]) -> str:
    """A line for each source; empty where there is one source."""
    sources = results.get("sources")
    if not sources:
        return ""
    theirs = (results.get("compared") or {}).get("sources", {})
    head = ["source", "questions", results["metric"], "95%"] + (["compared", "difference"] if theirs else [])
    rows = []
    for name, source in sources.items():
        low, high = source["interval"]
        row = [name, f"{source['questions']:,}", format_loss(source["score"]), f"{low:.4f} to {high:.4f}"]
        if theirs:
            other = theirs[name]["score"]
            row += [format_loss(other), f"{source['score'] - other:+.4f}"]
        rows.append(row)
    return f'<h2>Sources</h2>\n<div class="panel">{table(rows, head=head, numeric=range(1, len(head)))}</div>'


def _groups(results: Mapping[str, Any]) -> str:
    groups = results.get("groups")
    if not groups:
        return ""
    theirs = (results.get("compared") or {}).get("groups", {})
    head = ["group", "questions", "score"] + (["compared"] if theirs else [])
    rows = []
    for name, group in groups.items():
        other = [format_loss(theirs[name]["score"]) if name in theirs else ""] if theirs else []
        rows.append([name, f"{group['questions']:,}", format_loss(group["score"]), *other])
    return f'<h2>Groups</h2>\n<div class="panel">{table(rows, head=head, numeric=range(1, len(head)))}</div>'


def _detection(results: Mapping[str, Any]) -> str:
    """All boxes together and by name; empty for other metrics than detection."""
    detection = results.get("detection")
    if not detection:
        return ""
    counted = [("all boxes", detection), *list(detection["names"].items())[:LISTED]]
    rows = [
        [name, *share_texts(counts), f"{counts['found']:,}", f"{counts['extra']:,}", f"{counts['missed']:,}"]
        for name, counts in counted
    ]
    head = ["name", *(share.lower() if share != "F1" else share for share in SHARES), "found", "too many", "missed"]
    one, nothing = detection["one_box"], detection["nothing"]
    said = [f"A box is found where the IoU is at least {detection['iou']:g}."]
    if one["questions"]:
        accuracy = format_loss(one["accuracy"])
        said.append(f"Accuracy of the first box, on the {one['questions']:,} questions with one box: {accuracy}.")
    if nothing["questions"]:
        right = f"{nothing['right']:,} of {nothing['questions']:,}"
        said.append(f"Replies without a box, to questions with nothing to find: {right}.")
    if left := len(detection["names"]) + detection["more_names"] - (len(rows) - 1):
        said.append(f"{left:,} more names are not shown.")
    return (
        f'<h2>Boxes</h2>\n<div class="panel">{table(rows, head=head, numeric=range(1, len(head)))}'
        f"<p>{show(' '.join(said))}</p></div>"
    )


def _fields(results: Mapping[str, Any]) -> str:
    """A line for each field; empty where the task reads none."""
    fields = results.get("fields")
    if fields is None:
        return ""
    theirs = (results.get("compared") or {}).get("fields", {}).get("by_field", {})
    head = ["field", "documents", "exact", "anls"] + (["compared exact", "compared anls"] if theirs else [])
    rows = []
    for name, one in fields["by_field"].items():
        row = [name, f"{one['documents']:,}", format_loss(one["exact"]), format_loss(one["anls"])]
        if theirs:
            row += [format_loss(theirs[name]["exact"]), format_loss(theirs[name]["anls"])]
        rows.append(row)
    said = f"Over all fields: precision {format_loss(fields['precision'])}, recall {format_loss(fields['recall'])}."
    if found := fields.get("json"):
        accuracy = "none" if found["tree_accuracy"] is None else format_loss(found["tree_accuracy"])
        said += f" Tree edit accuracy of the JSON: {accuracy}; {found['broken']:,} replies hold no JSON object."
    return (
        f'<h2>Fields</h2>\n<div class="panel">{table(rows, head=head, numeric=range(1, len(head)))}'
        f"<p>{show(said)}</p></div>"
    )


def _changed(questions: Sequence[Question], records: Records, compared: Records) -> str:
    gained = [ours["score"] - theirs["score"] for ours, theirs in zip(records, compared, strict=True)]
    order = sorted(range(len(records)), key=lambda number: gained[number])
    parts = []
    for title, numbers in (
        ("Most gained on the compared model", [number for number in reversed(order) if gained[number] > 0][:CHANGED]),
        ("Most lost", [number for number in order if gained[number] < 0][:CHANGED]),
    ):
        panels = [_panel(questions[number], records[number], compared[number]) for number in numbers]
        parts.append(f"<h2>{title}</h2>\n" + ("\n".join(panels) or '<p class="muted">None.</p>'))
    return "\n".join(parts)


def _worst(questions: Sequence[Question], records: Records) -> str:
    order = sorted(range(len(records)), key=lambda number: records[number]["score"])[:WORST]
    panels = "\n".join(_panel(questions[number], records[number]) for number in order)
    intro = f"The {len(order)} lowest scores of {len(records):,}; all are in predictions.jsonl."
    return f'<h2>Worst rows</h2>\n<p class="muted">{intro}</p>\n{panels}'


def _first(questions: Sequence[Question], records: Records) -> str:
    panels = "\n".join(_panel(questions[number], records[number]) for number in range(min(WORST, len(records))))
    return f"<h2>First rows</h2>\n{panels}"


def _panel(question: Question, record: Mapping[str, Any], compared: Mapping[str, Any] | None = None) -> str:
    """One question with its images, its right answers and its reply, or the replies of two models side by side."""
    small = [thumbnail(source, question.access) for source in question.images]
    single = small[0] if len(small) == 1 and isinstance(small[0], Image.Image) else None
    gold = _gold_regions(record)
    replies = [record] if compared is None else [record, compared]
    drawn = [""] * len(replies)
    if single is not None and (gold or "objects" in record):
        for number, one in enumerate(replies):
            pair = gold, _reply_regions(one["reply"])
            drawn[number] = image_tag(draw_pair(single, *pair)) + pair_legend(*pair)
    images = "" if any(drawn) else "".join(map(image_tag, small))
    images = f'<div class="images">{images}</div>' if images else ""
    answers = "; ".join(dict.fromkeys(record["answers"]))
    asked = (
        f'<div><div class="name">Question</div><p class="said" dir="auto">{show(record["question"])}</p>'
        + (f'<div class="name">Right</div><p class="said" dir="auto">{show(answers)}</p>' if answers else "")
        + "</div>"
    )
    names = ["Reply"] if compared is None else ["Reply", "Reply of the compared model"]
    sides = [_side(name, one, html) for name, one, html in zip(names, replies, drawn, strict=True)]
    group = "".join(f"<span>{show(record[key])}</span>" for key in ("source", "group") if key in record)
    place = f"<span>{show(record['origin'])}, {show(record['id'])}</span>"
    return (
        f'<article class="panel row"><header>{place}{group}</header>'
        f'<div class="asked{"" if images else " bare"}">{images}{asked}</div>'
        f'<div class="sides">{"".join(sides)}</div></article>'
    )


def _side(name: str, record: Mapping[str, Any], drawn: str) -> str:
    badge = f'<span class="badge">score {format_loss(record["score"])}</span>' if "score" in record else ""
    if "unreadable" in record:
        said = f'<p class="nothing">Not asked: {show(record["unreadable"])}</p>'
    elif not record["prediction"].strip():
        said = '<p class="said"><span class="muted">(empty)</span></p>'
    else:
        text = compare(record["answers"][0], record["prediction"]) if record["answers"] else show(record["prediction"])
        said = f'<p class="said" dir="auto">{text}</p>'
    if "unread" in record:
        said += f'<p class="muted">Not read: replies that {show(record["unread"])} count as wrong.</p>'
    if "cut" in record:
        said += '<p class="muted">Cut at the most new tokens.</p>'
    return f'<section><div class="name">{show(name)}{badge}</div>{drawn}{said}</section>'


def _gold_regions(record: Mapping[str, Any]) -> tuple[Region, ...]:
    boxes = [(None, record["box"])] if "box" in record else []
    boxes += [(one["label"], one["box"]) for one in record.get("objects", ())]
    regions: list[Region] = []
    for label, box in boxes:
        width, height = record["image_size"]
        regions += parse_grounding(box_markup(box, width=width, height=height, label=label)).regions
    return tuple(regions)


def _reply_regions(reply: str) -> tuple[Region, ...]:
    """The boxes of a reply. The reply of a base model may continue an open `<box>` of its prompt."""
    return parse_grounding(reply).regions or parse_grounding(f"<box>{reply.strip()}").regions


def _facts(results: Mapping[str, Any]) -> str:
    panels = []
    for title, value in (
        ("Settings", results["settings"]),
        ("Identity", results["identity"]),
        ("Environment", results["environment"]),
    ):
        lines = [(key.removeprefix("versions."), text) for key, text in flatten(value)]
        panels.append(f'<div class="panel"><strong>{title}</strong>{table(lines)}</div>')
    return f'<h2>How it was made</h2>\n<div class="columns">{"".join(panels)}</div>'
