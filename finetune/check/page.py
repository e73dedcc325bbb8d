"""What a check found as one self-contained page. Everything from data or recipe is text in it, never markup."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from finetune.check.epoch_estimate import Epoch
from finetune.check.findings import Findings
from finetune.check.histogram import histogram_chart, make_histogram
from finetune.check.sample_preview import Piece, Preview, image_name
from finetune.data.checks.checked import Checked
from finetune.data.message_parts import grounding_texts
from finetune.data.samples import Samples
from finetune.data.summary import count_sources, problem_kinds
from finetune.quantities import format_count, format_duration
from finetune.recipe import Source
from finetune.report.images import image_tag, picture_tag, thumbnail
from finetune.report.page import page, show, table, tiles
from qwenvl import load_image
from qwenvl.images.drawing import draw_regions
from qwenvl.images.resizing import resize
from qwenvl.text.boxes import CONTROL_TOKEN
from qwenvl.text.grounding import Region, parse_grounding
from qwenvl.views import PagePart, whole_of

LISTED_PROBLEMS = 200
SHOWN_KINDS = 20
SHOWN_IMAGES = 4  # of a sample; a page of many pictures would have many megabytes


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
            '<h2>Samples</h2><p class="muted">As the model reads them; what is <mark>marked</mark> is trained, and '
            '<code class="token">tokens in frames</code> are control tokens and not text. Of each image, first as it '
            "is, then the picture or pictures that the model gets.</p>"
        )
        size = int(findings.base.processor.image_processor.size["height"])
        body += [_sample(preview, grounding, size) for preview in findings.previews]
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
    if findings.memory is None:
        return ""
    plan = findings.memory.plan
    head, *rows = plan.table()
    said = "".join(f"<p>{show(line)}</p>" for line in (*findings.memory.lines(), findings.cards))
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


def _sample(preview: Preview, grounding: bool, size: int) -> str:
    rendered, fitted = preview.fitted.rendered, preview.fitted
    facts = [
        f"{preview.part}: {preview.sample.origin}",
        f"{len(rendered.ids):,} tokens, {rendered.supervised:,} trained"
        + (f", without its first {fitted.turns_dropped} turns" if fitted.turns_dropped else ""),
    ]
    header = "".join(f"<span>{show(fact)}</span>" for fact in facts)
    text = "".join(_pieces(preview.pieces))
    left_out = "".join(f"<li>{show(line)}</li>" for line in preview.left_out)
    left_out = f'<ul class="left-out">{left_out}</ul>' if left_out else ""
    images = "".join(_seen_images(preview, grounding, size))
    return (
        f'<article class="panel row"><header>{header}</header>{left_out}{images}'
        f'<p class="said" dir="auto">{text}</p></article>'
    )


def _pieces(pieces: Iterable[Piece]) -> Iterator[str]:
    """The pieces as HTML. A control token that a text spells has no frame, and a note that it is text."""
    for (trained, context), run in groupby(pieces, lambda piece: (piece.trained, piece.context)):
        html = "".join(map(_piece, run))
        if context:
            html = f'<span class="context"><span class="note">context, not trained</span>{html}</span>'
        yield f"<mark>{html}</mark>" if trained else html


def _piece(piece: Piece) -> str:
    if piece.kind == "control":
        return f'<code class="token">{show(piece.text)}</code>'
    if piece.kind == "image":
        return f'<span class="muted">{show(piece.text)}</span>'
    html, end = "", 0
    for spelled in CONTROL_TOKEN.finditer(piece.text):
        html += show(piece.text[end : spelled.start()])
        html += f'<span class="spelled">{show(spelled[0])}<span class="note">as text</span></span>'
        end = spelled.end()
    return html + show(piece.text[end:])


def _seen_images(preview: Preview, grounding: bool, size: int) -> Iterator[str]:
    """A figure for each of the first images: as it is, with the boxes of the sample's texts where there is only one,
    and beside it every picture that the model gets of it."""
    sample, shown = preview.sample, preview.fitted.rendered.images
    # The pictures of one image follow one another.
    images = [list(run) for _, run in groupby(shown, key=lambda picture: id(whole_of(picture)))]
    regions: list[Region] = []
    if len(images) == 1:  # of several, the markup does not say which one it refers to
        for _, text in grounding_texts(preview.fitted.messages, grounding):
            regions += parse_grounding(text).regions
    for pictures in images[:SHOWN_IMAGES]:
        whole = thumbnail(whole_of(pictures[0]), sample.access)
        if isinstance(whole, str):
            yield image_tag(whole)
            continue
        if regions:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # labels are left out on an image too small for them
                whole = draw_regions(whole, regions)
        figures = [_figure(image_tag(whole), image_name(whole_of(pictures[0])))]
        for picture in pictures:
            place = f"{picture.place.split(',')[0]}, " if isinstance(picture, PagePart) else ""
            seen = resize(load_image(picture, access=sample.access), size, size)
            figures += [_figure(picture_tag(seen), f"{place}as the model gets it: {size} x {size}")]
        yield f'<div class="seen">{"".join(figures)}</div>'
    if len(images) > SHOWN_IMAGES:
        yield f'<p class="muted">and {len(images) - SHOWN_IMAGES:,} more images</p>'


def _figure(tag: str, caption: str) -> str:
    return f"<figure>{tag}<figcaption>{show(caption)}</figcaption></figure>"
