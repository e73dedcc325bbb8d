"""What a check found, on a terminal or as plain text. Control characters of data or recipe are made visible first."""

from collections.abc import Iterable, Iterator
from itertools import groupby

from rich.console import Console
from rich.text import Text

from finetune.check.findings import Findings
from finetune.check.histogram import bars, make_histogram
from finetune.check.sample_preview import Piece, Preview, one_line
from finetune.data.reading import rules_of, views_of
from finetune.data.sample import SHOWN_PROBLEMS
from finetune.data.summary import describe_data, describe_long, describe_sources, describe_train_on, problem_kinds
from finetune.model.components import table_of_parameters
from finetune.quantities import format_count, format_duration
from finetune.report.page import readable
from finetune.terminal import labelled
from qwenvl.text.boxes import CONTROL_TOKEN

SHOWN_KINDS = 20
LONGEST_PIECE = 4000  # characters of a text that are shown
STYLES = {"control": "dim", "image": "magenta", "text": ""}
TRAINED, CONTEXT = "bold green", "yellow"


def print_findings(findings: Findings, console: Console) -> None:
    """Print all findings; without colours, trained text stands between ⟦ and ⟧."""
    for label, text in (*_model(findings), *_data(findings), *_steps(findings), *_memory(findings)):
        console.print(Text(labelled(label, text)))
    for bar in _distributions(findings):
        console.print(bar)
    for name in findings.parts:
        for line in _problems(findings, name):
            console.print(Text(line))
    marked = console.color_system is None or console.no_color
    for preview in findings.previews:
        console.print()
        console.print(Text(one_line(_title(preview)), style="bold"))
        for line in preview.left_out:
            console.print(Text(f"  {one_line(line)}"))
        for shown in sample_text(preview.pieces, marked=marked).split("\n"):
            console.print(Text().append("  │ ", style="dim").append_text(shown))
    console.print()


def sample_text(pieces: Iterable[Piece], *, marked: bool) -> Text:
    """A sample's pieces as coloured text, or with marks around what is trained.

    A control token that a text spells is no token: `‹<|im_end|> as text›`. A reply that is marked as context is
    `‹context: ...›`.
    """
    text = Text()
    for (trained, context), run in groupby(pieces, lambda piece: (piece.trained, piece.context)):
        text.append("⟦" if marked and trained else "")
        text.append("‹context: " if context else "", style=CONTEXT)
        for piece in run:
            told = CONTROL_TOKEN.sub(r"‹\g<0> as text›", piece.text) if piece.kind == "text" else piece.text
            shown = _fold(readable(told)).replace("\t", "    ")
            text.append(shown, style=TRAINED if trained else CONTEXT if context else STYLES[piece.kind])
        text.append("›" if context else "", style=CONTEXT)
        text.append("⟧" if marked and trained else "")
    return text


def _model(findings: Findings) -> Iterator[tuple[str, str]]:
    """Labelled lines, as those of the following functions; an empty label continues the line above."""
    base = findings.base
    bits = f" ({', '.join(base.quantized)} in 4 bits)" if base.quantized else ""
    yield "model", f"{one_line(findings.recipe.model.path)}{bits}"
    for note in base.notes(views_of(findings.recipe)):
        yield "", note
    if findings.given is not None:
        part = findings.parts.get("train")
        system = None if part is None or part.checked is None else part.checked.system
        yield "adapter", f"goes on from {one_line(findings.given.folder)}"
        for note in findings.given.notes(findings.recipe, base, views_of(findings.recipe), system):
            yield "", one_line(note)
    for number, line in enumerate(table_of_parameters(findings.parameters or {})):
        yield "" if number else "trained", line


def _data(findings: Findings) -> Iterator[tuple[str, str]]:
    for name, part in findings.parts.items():
        if part.samples is None or part.checked is None:
            yield f"{name} data", "cannot be opened"
            continue
        yield f"{name} data", describe_data(part.checked)
        base, pages = findings.base, findings.recipe.data.pages is not None
        if long := describe_long(
            part.checked, rules_of(findings.recipe, base.processor), base.seq_length, pages=pages
        ):
            yield "", long
        seed = findings.recipe.seed
        if name == "train" and (said := describe_train_on(findings.recipe.data)):
            yield "", said
        for line in describe_sources(part.sources, part.samples, part.checked, seed):
            yield "", one_line(line)
        yield from (("", one_line(note)) for note in part.samples.notes)
        if name in findings.opened:
            opened = findings.opened[name]
            rate = format_count(opened.opened / max(opened.seconds, 1e-9))
            speed = f"opened in {format_duration(opened.seconds)}, {rate} images/s"
            before = f" and {opened.remembered:,} decoded before" if opened.remembered else ""
            yield "", f"{opened.opened:,} images{before} {speed}; {len(opened.problems):,} cannot be decoded"
            if opened.note:
                yield "", opened.note
        if name in findings.legibility and findings.legibility[name].warning:
            yield "", one_line(f"warning: {findings.legibility[name].warning}")
    for number, line in enumerate(findings.overlap):
        yield "" if number else "overlap", one_line(line)
    if findings.task is not None:
        yield "eval task", one_line(findings.task)


def _steps(findings: Findings) -> Iterator[tuple[str, str]]:
    epoch = findings.epoch
    if epoch is None:
        return
    yield "epoch", f"{epoch.samples:,} samples, {epoch.tokens:,} tokens, {epoch.supervised:,} of them trained"
    on = f" on {epoch.processes} processes" if epoch.processes > 1 else ""
    steps = f"{epoch.steps:,} an epoch, {epoch.all_steps:,} in all"
    yield "steps", f"{steps}; {epoch.samples_per_step:,} samples a step{on}"
    fill = "" if epoch.fill is None else f" of at most {epoch.budget:,} tokens, {epoch.fill:.0%} full (estimated)"
    for note in findings.notes:
        yield "", note
    yield "forwards", f"{epoch.packs_per_step:.1f} a step{fill}"
    if findings.budget is not None and findings.budget.reason:
        yield "packing", str(findings.budget)
    if findings.vision_cache is not None:
        yield "vision", one_line(findings.vision_cache)


def _memory(findings: Findings) -> Iterator[tuple[str, str]]:
    if findings.memory is None:
        return
    for number, line in enumerate(findings.memory.lines()):
        yield "" if number else "memory", line
    for name, *sizes in findings.memory.plan.table():
        yield "", f"{name:<26}{''.join(f'{size:>10}' for size in sizes)}"
    yield "", findings.cards


def _distributions(findings: Findings) -> Iterator[Text]:
    for name, part in findings.parts.items():
        if part.checked is None or not len(part.checked.kept):
            continue
        for what, values in (("tokens", part.checked.lengths), ("images", part.checked.images)):
            yield Text(f"\n{what} of a sample, {name} data")
            for label, bar, count in bars(make_histogram(values)):
                yield Text("  ").append(label).append(f"  {count}  ").append(bar, style="cyan")


def _problems(findings: Findings, name: str) -> Iterator[str]:
    problems = findings.problems(name)
    if not problems:
        return
    skipped = findings.skipped(name)
    state = f", {skipped:,} rows of them skipped (on_bad_row: skip)" if skipped else ""
    yield f"\n{len(problems):,} {'problem' if len(problems) == 1 else 'problems'} in the {name} data{state}"
    kinds = problem_kinds(problems)
    for kind, count in kinds[:SHOWN_KINDS]:
        yield f"  {count:>9,} x {one_line(kind)}"
    if len(kinds) > SHOWN_KINDS:
        yield f"  and {len(kinds) - SHOWN_KINDS:,} more kinds"
    yield f"the first {min(len(problems), SHOWN_PROBLEMS)}:" if len(problems) > 1 else "it is:"
    for problem in problems[:SHOWN_PROBLEMS]:
        yield f"  {one_line(problem)}"
    if len(problems) > SHOWN_PROBLEMS:
        yield f"  ... and {len(problems) - SHOWN_PROBLEMS:,} more"


def _title(preview: Preview) -> str:
    rendered = preview.fitted.rendered
    shortened = f", without its first {preview.fitted.turns_dropped} turns" if preview.fitted.turns_dropped else ""
    return (
        f"{preview.part}: {preview.sample.origin}: {len(rendered.ids):,} tokens, {rendered.supervised:,} trained, "
        f"{len(rendered.images)} {'image' if len(rendered.images) == 1 else 'images'}{shortened}"
    )


def _fold(text: str) -> str:
    """The text, or its beginning and end, and how much is between them."""
    if len(text) <= LONGEST_PIECE:
        return text
    half = LONGEST_PIECE // 2
    return f"{text[:half]}[... {len(text) - 2 * half:,} characters ...]{text[-half:]}"
