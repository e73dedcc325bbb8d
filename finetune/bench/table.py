"""The rows of the bench: measurements, figures derived from them, and the table in Markdown and for the terminal."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.quantities import format_bytes, format_count

OURS, PUBLISHED = "ours", "published"
SAMPLES = 8
"""In one optimizer step."""

NOT_MEASURED = "-"


@dataclass(frozen=True)
class Row:
    """One training at one length. What was not measured is None.

    Attributes:
        weights: lora, qlora or full.
        settings: ours or published.
        samples: "mix", or the tokens of each.
        padded_to: tokens that each sample is padded to; None without padding.
        tokens: of all measured steps, without padding.
        forwards: of all measured steps.
        seconds: of each measured step.
        peak: most bytes in tensors during the steps.
        reserved: most bytes that the allocator reserved for them.
        plan: bytes that the memory plan predicts for the steps.
        useful, executed: floating point operations of all measured steps; see `flops`.
        peak_flops: floating point operations per second that the device can do at most.
        note: why a row was not measured, or what changed during it.
        switches: what the recipe left open, as it was settled, and why.
    """

    weights: str
    settings: str
    samples: str
    padded_to: int | None = None
    tokens: int | None = None
    forwards: int | None = None
    seconds: tuple[float, ...] = ()
    peak: int | None = None
    reserved: int | None = None
    plan: int | None = None
    useful: int | None = None
    executed: int | None = None
    peak_flops: float | None = None
    note: str = ""
    switches: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over the measured steps."""
        return sum(self.seconds) / len(self.seconds) if self.seconds else None

    @property
    def forwards_per_step(self) -> float | None:
        return self.forwards / len(self.seconds) if self.seconds and self.forwards is not None else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / sum(self.seconds) if self.seconds and self.tokens is not None else None

    @property
    def useful_share(self) -> float | None:
        return self._share(self.useful)

    @property
    def executed_share(self) -> float | None:
        return self._share(self.executed)

    @property
    def plan_error(self) -> float | None:
        """The plan's relative error: positive if it is above the measured peak."""
        return self.plan / self.peak - 1 if self.plan and self.peak else None

    def _share(self, flops: int | None) -> float | None:
        return flops / sum(self.seconds) / self.peak_flops if self.seconds and flops and self.peak_flops else None

    def as_json(self) -> dict[str, Any]:
        derived = ("seconds_per_step", "tokens_per_second", "useful_share", "executed_share", "plan_error")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def speed_up(row: Row, rows: Sequence[Row]) -> float | None:
    """How many times faster than the published settings on the same samples; None for the published row itself."""
    if row.settings == PUBLISHED:
        return None
    for other in rows:
        if (other.weights, other.samples, other.settings) == (row.weights, row.samples, PUBLISHED):
            theirs, ours = other.seconds_per_step, row.seconds_per_step
            return theirs / ours if theirs and ours else None
    return None


COLUMNS = {
    "weights": "",
    "settings": "",
    "samples": "tokens of each, or the mix",
    "forwards": "of one step",
    "peak": "most bytes in tensors on the device during the steps, without what a paged optimizer moves in and out; "
    "on a CPU with the batches, which wait in host memory",
    "reserved": "most bytes that the allocator held on the device; the CUDA context (about 0.5 GB) is beside it",
    f"s / {SAMPLES}": f"seconds of an optimizer step of {SAMPLES} samples, all of it: batches, clipping, optimizer",
    "tokens/s": "without padding",
    "useful": "share of the device's peak arithmetic that goes into real tokens, forward and backward once",
    "executed": "share with what is computed again (checkpointing), for padding, and for logits that nothing needs",
    "plan": "what the memory plan said for the steps; it plans our settings only",
    "error": "of the plan: above (+) or below (-) the measured peak",
    "speed-up": "over the published settings on the same samples",
}
"""Columns of the table, and what each means."""

WORDS = 3
"""Columns of text; the others hold numbers."""


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """A line of the table."""

    def percent(share: float) -> str:
        return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"

    return [
        row.weights,
        row.settings,
        row.samples,
        _shown(row.forwards_per_step, lambda forwards: f"{forwards:.3g}"),
        _shown(row.peak, format_bytes),
        _shown(row.reserved, format_bytes),
        _shown(row.seconds_per_step, format_seconds),
        _shown(row.tokens_per_second, format_count),
        _shown(row.useful_share, percent),
        _shown(row.executed_share, percent),
        _shown(row.plan, format_bytes),
        _shown(row.plan_error, lambda error: f"{100 * error:+.1f} %"),
        _shown(speed_up(row, rows), lambda factor: f"{factor:.2f}x"),
    ]


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return NOT_MEASURED if value is None else form(value)


def terminal_table(rows: Sequence[Row]) -> list[str]:
    """The table in aligned columns, with the notes below."""
    lines = [list(COLUMNS), *(cells(row, rows) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = []
    for line in lines:
        aligned = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        aligned[:WORDS] = [cell.ljust(width) for cell, width in zip(line[:WORDS], widths[:WORDS], strict=True)]
        table.append("  ".join(aligned))
    return [*table, *notes(rows), *settled(rows)]


def settled(rows: Sequence[Row]) -> list[str]:
    """What the recipe left open, as it was settled: one line for all rows with equal settings."""
    samples: dict[str, list[str]] = {}
    for row in rows:
        if row.switches:
            told = ", ".join(f"{key} {value}" for key, value in row.switches.items() if key != "reasons")
            samples.setdefault(f"{row.weights}, {row.settings}, {{}}: {told}", []).append(row.samples)
    return [line.format(" ".join(names)) for line, names in samples.items()]


def notes(rows: Sequence[Row]) -> list[str]:
    return [f"{name(row)}: {row.note}" for row in rows if row.note]


def name(row: Row) -> str:
    return f"{row.weights}, {row.settings}, {row.samples}"


def in_words(row: Row) -> str:
    """A finished row as one line."""
    if not row.seconds:
        return f"{name(row)}: {row.note}"
    told = [
        _shown(row.peak, format_bytes),
        f"{_shown(row.seconds_per_step, format_seconds)} s for {SAMPLES} samples",
        f"{_shown(row.tokens_per_second, format_count)} tokens/s",
    ]
    return f"{name(row)}: {', '.join(told)}"


def format_seconds(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with all derived figures; null for what was not measured."""
    return [{**row.as_json(), "speed_up": speed_up(row, rows)} for row in rows]


def markdown(title: str, facts: dict[str, str], rows: Sequence[Row]) -> str:
    """The Markdown page: what was measured where, the table, and the meaning of its columns."""
    lines = [f"# {title}", "", *(f"- {what}: {value}" for what, value in facts.items()), ""]
    lines += [_markdown_line(list(COLUMNS)), _markdown_line(["---"] * WORDS + ["---:"] * (len(COLUMNS) - WORDS))]
    lines += [_markdown_line(cells(row, rows)) for row in rows]
    if told := [*notes(rows), *settled(rows)]:
        lines += ["", *(f"- {line}" for line in told)]
    lines += ["", *(f"- **{column}**: {text}" for column, text in COLUMNS.items() if text)]
    lines += ["", f"`{NOT_MEASURED}` was not measured, or has no meaning there. GB are 1e9 bytes."]
    return "\n".join(lines) + "\n"


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
