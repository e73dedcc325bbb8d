"""Histograms of whole numbers: bars for a terminal, and an SVG for a page."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from finetune.report.charts import HEIGHT, INNER_HEIGHT, INNER_WIDTH, LEFT, TOP, WIDTH, make_axis

MOST_BINS = 12


@dataclass(frozen=True)
class Histogram:
    """Bin n counts the values from `first + n * width` to below the next bin."""

    first: int
    width: int
    counts: Sequence[int]

    def label(self, number: int) -> str:
        """The values of a bin: `256-511`, or `3` where it has one value."""
        low = self.first + number * self.width
        return f"{low:,}" if self.width == 1 else f"{low:,}-{low + self.width - 1:,}"


def make_histogram(values: np.ndarray) -> Histogram:
    """Count values in at most `MOST_BINS` bins, whose width is 1, 2 or 5 times a power of ten.

    Args:
        values: (n,) whole numbers from 0; at least one.
    """
    low, high = int(values.min()), int(values.max())
    widths = (factor * 10**power for power in range(19) for factor in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < MOST_BINS)
    first = low // width
    return Histogram(first * width, width, np.bincount(values // width - first).tolist())


def bars(histogram: Histogram, *, width: int = 40) -> Iterable[tuple[str, str, str]]:
    """(label, bar, count) of each bin, label and count right-aligned; the longest bar has `width` characters.

    Every bin that is not empty has a bar of at least one character.
    """
    labels = [histogram.label(number) for number in range(len(histogram.counts))]
    shown = [f"{count:,}" for count in histogram.counts]
    for label, text, count in zip(labels, shown, histogram.counts, strict=True):
        length = max(round(width * count / max(histogram.counts)), count > 0)
        yield label.rjust(max(map(len, labels))), "█" * length, text.rjust(max(map(len, shown)))


def histogram_chart(title: str, histogram: Histogram, *, unit: str) -> str:
    """A `<figure>` with the bars; the page's style sheet has the colours (`charts.STYLE`)."""
    axis = make_axis(0.0, float(max(histogram.counts)))
    step = INNER_WIDTH / len(histogram.counts)
    bottom = TOP + INNER_HEIGHT
    body = []
    for value, label in zip(axis.ticks, axis.labels, strict=True):
        y = bottom - INNER_HEIGHT * value / axis.high
        body.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + INNER_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    every = -(-len(histogram.counts) // 6)  # labels that fit
    for number, count in enumerate(histogram.counts):
        x, height = LEFT + number * step, INNER_HEIGHT * count / axis.high
        tip = f"<title>{histogram.label(number)} {escape(unit)}: {count:,}</title>"
        shape = f'x="{x + 1:.1f}" y="{bottom - height:.1f}" width="{max(step - 2, 1):.1f}" height="{height:.1f}"'
        body.append(f'<rect class="a mark" {shape}>{tip}</rect>')
        if number % every == 0:
            body.append(f'<text x="{x:.1f}" y="{bottom + 17}">{histogram.first + number * histogram.width:,}</text>')
    body.append(f'<text x="{LEFT + INNER_WIDTH}" y="{HEIGHT - 5}" text-anchor="end">{escape(unit)}</text>')
    return (
        f'<figure class="panel"><figcaption><strong>{escape(title)}</strong></figcaption>'
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(body)}</svg></figure>"
    )
