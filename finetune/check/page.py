"""What a check found as one self-contained page. Everything from data or recipe is text in it, never markup."""

import warnings
from collections.abc import Iterable, Iterator, Sequence

from PIL import Image

from finetune.check.epoch_estimate import Epoch
from finetune.check.findings import Findings
from finetune.check.histogram import histogram_chart, make_histogram
from finetune.check.sample_preview import Piece, Preview
from finetune.data.checking import Checked
from finetune.data.message_parts import grounding_texts
from finetune.data.samples import Samples
from finetune.data.summary import count_sources, problem_kinds
from finetune.memory.free_memory import describe_cards
from finetune.quantities import format_count, format_duration
from finetune.recipe import Source
from finetune.report.images import image_tag, thumbnail
from finetune.report.page import page, show, table, tiles
from qwenvl.images.drawing import draw_regions
from qwenvl.text.grounding import Region, parse_grounding

LISTED_PROBLEMS = 200
SHOWN_KINDS = 20


def check_page(findings: Findings) -> str:
    """The whole document."""
    grounding = findings.recipe.data.grounding
    body = [
        _head(findings),
        _tiles(findings),
        *(
            _part(name, part.sources, part.samples, part.checked)
            for name, part in findings.parts.items()
            if part.samples is not None and part.checked is not None
        ),
        _legibility(findings),
        _overlap(findings),
        _parameters(findings),
        _memory(findings),
        *(_problems(findings, name) for name in findings.parts),
    ]
    if findings.previews:
        body.append(
            '<h2>Samples</h2><p class="muted">As the model reads them; what is <mark>marked</mark> is trained.</p>'
        )
        body += [_sample(preview, grounding) for preview in findings.previews]
    return page(f"Check of {findings.recipe.output}", "\n".join(body))


def _head(findings: Findings) -> str:
    head = f'<h1>Check of {show(findings.recipe.output)}</h1><p class="muted">{show(findings.recipe.model.path)}</p>'
    if not findings.refusals:
        return head + '<p><span class="status finished">ready to train</span></p>'
    reasons = "".join(f"<li>{show(what)}: {show(why)}</li>" for what, why in findings.refusals)
    return head + f'<div class="panel notes"><strong>A run would stop here</strong><ul>{reasons}</ul></div>'


def _legibility(findings: Findings) -> str:
    warnings = [f"{name} data: {found.warning}" for name, found in findings.legibility.items() if found.warning]
    if not warnings:
        return ""
    lines = "".join(f"<li>{show(line)}</li>" for line in warnings)
    return f'<div class="panel notes"><strong>Small text</strong><ul>{lines}</ul></div>'


def _overlap(findings: Findings) -> str:
    if not findings.overlap:
        return ""
    lines = "".join(f"<li>{show(line)}</li>" for line in findings.overlap)
    return f'<div class="panel notes"><strong>Evaluated on and trained on as well</strong><ul>{lines}</ul></div>'


def _tiles(findings: Findings) -> str:
    values = []
    if (epoch := findings.epoch) is not None:
        values = _epoch_tiles(epoch)
    for name, opened in findings.opened.items():
        rate = f"{format_count(opened.opened / max(opened.seconds, 1e-9))} images/s"
        more = f"{rate}, {format_duration(opened.seconds)}; {len(opened.problems):,} cannot be decoded"
        values.append((f"Images opened, {name}", f"{opened.opened:,}", more))
    if findings.task is not None:
        values.append(("Evaluation task", findings.task, ""))
    if findings.vision_cache is not None:
        values.append(("Vision cache", findings.recipe.data.vision_cache, findings.vision_cache))
    return tiles(values)


def _epoch_tiles(epoch: Epoch) -> list[tuple[str, str, str]]:
    fill = "" if epoch.fill is None else f"of at most {epoch.budget:,} tokens, {epoch.fill:.0%} full (estimated)"
    share = epoch.supervised / max(epoch.tokens, 1)
    return [
        ("Samples an epoch", f"{epoch.samples:,}", f"{epoch.samples_per_step:,} a step"),
        ("Tokens an epoch", f"{epoch.tokens:,}", f"{share:.1%} trained"),
        ("Steps", f"{epoch.all_steps:,}", f"{epoch.steps:,} an epoch"),
        ("Forwards a step", f"{epoch.packs_per_step:.1f}", fill),
    ]


def _part(name: str, sources: Sequence[Source], samples: Samples, checked: Checked) -> str:
    rows = [
        (
            source.path,
            source.format,
            f"{count.kept:,}",
            f"{count.total:,}",
            f"{count.weight:g}",
            count.drawn,
            f"{count.tokens:,}",
        )
        for source, count in zip(sources, count_sources(samples, checked), strict=True)
    ]
    head = ("source", "format", "kept", "of", "weight", "an epoch", "tokens")
    said = [
        f"{len(checked.problems):,} rows cannot be used." if checked.problems else "",
        f"{len(checked.dropped_long):,} samples are too long." if checked.dropped_long else "",
        f"{len(checked.shortened):,} samples are shortened by turns at the front." if checked.shortened else "",
        *(show(f"{note}.") for note in samples.notes),
        f"{checked.pages_left_out:,} pages beyond data.pages.first are left out." if checked.pages_left_out else "",
    ]
    charts = ""
    if len(checked.kept):
        charts = (
            f'<div class="charts">{histogram_chart("Length", make_histogram(checked.lengths), unit="tokens")}'
            f"{histogram_chart('Images of a sample', make_histogram(checked.images), unit='images')}</div>"
        )
    return (
        f'<h2>{show(name.capitalize())} data</h2><div class="panel long">{table(rows, head=head, numeric=range(2, 7))}'
        f"<p>{' '.join(filter(None, said))}</p></div>{charts}"
    )


def _parameters(findings: Findings) -> str:
    if findings.parameters is None:
        return ""
    rows = [(name, f"{count.trained:,}", f"{count.total:,}") for name, count in findings.parameters.items()]
    counted = table(rows, head=("", "trained", "of"), numeric=(1, 2))
    return f'<h2>What is trained</h2><div class="panel">{counted}</div>'


def _memory(findings: Findings) -> str:
    if findings.memory is None or findings.memory.plan is None:
        return ""
    plan = findings.memory.plan
    head, *rows = plan.table()
    said = "".join(f"<p>{show(line)}</p>" for line in (*findings.memory.lines(), describe_cards(plan.peak)))
    counted = table(rows, head=head, numeric=range(1, len(head)))
    return f'<h2>Memory</h2><div class="panel">{counted}{said}</div>'


def _problems(findings: Findings, name: str) -> str:
    problems = findings.problems(name)
    if not problems:
        return ""
    kinds = problem_kinds(problems)
    counted = table([(kind, f"{count:,}") for kind, count in kinds[:SHOWN_KINDS]], numeric=(1,))
    more = f"<p>and {len(kinds) - SHOWN_KINDS:,} more kinds</p>" if len(kinds) > SHOWN_KINDS else ""
    rows = [(str(problem.origin), problem.field, problem.reason) for problem in problems[:LISTED_PROBLEMS]]
    listed = table(rows, head=("row", "field", "problem"))
    of = f"<p>The first {LISTED_PROBLEMS} of {len(problems):,}.</p>" if len(problems) > LISTED_PROBLEMS else ""
    return (
        f'<h2>{len(problems):,} problems in the {show(name)} data</h2><div class="panel long">{counted}{more}</div>'
        f'<div class="panel long">{listed}{of}</div>'
    )


def _sample(preview: Preview, grounding: bool) -> str:
    rendered, fitted = preview.fitted.rendered, preview.fitted
    facts = [
        f"{preview.part}: {preview.sample.origin}",
        f"{len(rendered.ids):,} tokens, {rendered.supervised:,} trained"
        + (f", without its first {fitted.turns_dropped} turns" if fitted.turns_dropped else ""),
    ]
    header = "".join(f"<span>{show(fact)}</span>" for fact in facts)
    text = "".join(_pieces(preview.pieces))
    tags = "".join(map(image_tag, _images(preview, grounding)))
    images = f'<div class="images">{tags}</div>' if tags else ""
    return (
        f'<article class="panel row"><header>{header}</header><div class="asked{"" if images else " bare"}">{images}'
        f'<p class="said" dir="auto">{text}</p></div></article>'
    )


def _pieces(pieces: Iterable[Piece]) -> Iterator[str]:
    for piece in pieces:
        html = show(piece.text)
        if piece.kind != "text":
            html = f'<span class="muted">{html}</span>'
        yield f"<mark>{html}</mark>" if piece.trained else html


def _images(preview: Preview, grounding: bool) -> Sequence[Image.Image | str]:
    """Thumbnails of the sample's images; where there is only one, with the boxes of the sample's texts drawn on it."""
    sample, messages = preview.sample, preview.fitted.messages
    small = [thumbnail(source, sample.access) for source in preview.fitted.rendered.images]
    regions: list[Region] = []
    for _, text in grounding_texts(messages, grounding):
        regions += parse_grounding(text).regions
    # Of several images, the markup does not say which one it refers to.
    if regions and len(small) == 1 and isinstance(small[0], Image.Image):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # labels are left out on an image too small for them
            return [draw_regions(small[0], regions)]
    return small
