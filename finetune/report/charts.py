"""Line charts as inline SVG: no library, no script, colours from the page's style sheet.

    line_chart("Loss", [Series("each log", points, "dots"), Series("smoothed", smooth(points), "line")], unit="nats")

The style sheet defines the colours that `STYLE` refers to, so that one chart suits light and dark pages and paper.
Text scales with the chart, which is meant to be shown 300 to 520 pixels wide.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Literal, NamedTuple, get_args

from finetune.quantities import format_count

Points = Sequence[tuple[float, float]]

# In units of the SVG: the whole chart, and the frame of the curves in it.
WIDTH, HEIGHT = 440, 240
LEFT, TOP, RIGHT, BOTTOM = 50, 12, 14, 40
INNER_WIDTH, INNER_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

MAX_LINE_POINTS = 600  # more than the chart has pixels
MAX_DOTS = 250
LARGEST, SMALLEST = 1e30, 1e-30  # magnitudes that an axis can show
SPIKE = 20  # values are cut off if the largest is this many times the range of the lower 95 % above the smallest

Colour = Literal["a", "b", "c", "d", "e", "f"]

STYLE = """
.chart { width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif; }
.chart text { fill: var(--muted); }
.chart .grid { stroke: var(--rule); stroke-width: 1; }
.chart .axis { stroke: var(--muted); stroke-width: 1; }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.legend { display: inline-flex; align-items: center; gap: .35em; margin-right: .9em; white-space: nowrap; }
.legend svg { width: 1.5em; height: .8em; }
""" + "".join(
    f".chart .{colour}.line {{ stroke: var(--series-{colour}); }} "
    f".chart .{colour}.mark {{ fill: var(--series-{colour}); }} "
    f".chart .{colour}.dot {{ fill: var(--series-{colour}); opacity: .35; }}\n"
    for colour in get_args(Colour)
)


class Series(NamedTuple):
    """One curve.

    Attributes:
        name: for the legend.
        points: (x, y) within +-LARGEST, sorted by x.
        look: "line"; "dots", faint, for raw values; "marks", a line with a mark at each point, for few points.
        colour: one of the style sheet's, `--series-a` and so on.
    """

    name: str
    points: Points
    look: Literal["line", "dots", "marks"] = "line"
    colour: Colour = "a"


class Axis(NamedTuple):
    """From `low` to `high`, with ticks at round numbers between them."""

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]


def line_chart(title: str, series: Sequence[Series], *, unit: str, from_zero: bool = False) -> str:
    """A `<figure>`: title, unit, legend where there are several curves, and the chart over optimizer steps.

    Values far above all others (a spike of the gradient norm) are drawn as triangles at the upper edge and counted in
    a remark, so that they do not flatten the rest.

    Args:
        title: plain text, as all other text here.
        series: at least one point in all of them together.
        unit: of y.
        from_zero: start the y axis at 0, for rates and sizes; otherwise it spans the values.

    Raises:
        ValueError: no points.
    """
    series = [one for one in series if one.points]
    if not series:
        raise ValueError(f"the chart {title!r} has no points.")
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    ceiling = spike_limit(ys)
    spikes = sum(y > ceiling for one in series for _, y in one.points if one.look != "line")
    x_axis = make_axis(min(xs), max(xs), whole=True, snug=True)
    y_axis = make_axis(0.0 if from_zero else min(ys), min(max(ys), ceiling))
    body = [*_grid(x_axis, y_axis), *(_curve(one, x_axis, y_axis, ceiling) for one in series)]
    label = f"{title}, {unit}: from {min(ys):.4g} to {max(ys):.4g} over steps {min(xs):g} to {max(xs):g}"
    remark = f'<span class="remark">{spikes} above the chart</span>' if spikes else ""
    legend = "".join(map(_legend, series)) if len(series) > 1 else ""
    return (
        f'<figure class="panel"><figcaption><strong>{escape(title)}</strong> <span class="unit">{escape(unit)}</span>'
        f'<div class="legends">{legend}{remark}</div></figcaption>'
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(body)}</svg></figure>"
    )


def smooth(points: Points) -> list[tuple[float, float]]:
    """Smooth a curve and drop its spikes.

    Applies an exponential moving average forwards and then backwards, so that the lags cancel. In each the weight of a
    value falls to 1/e over a fortieth of the points; weights are normalised by their sum, so that the ends are not
    drawn to 0.
    """
    ceiling = spike_limit(y for _, y in points)
    kept = [(x, y) for x, y in points if y <= ceiling]
    forwards = _running_mean([y for _, y in kept])
    both_ways = _running_mean(forwards[::-1])[::-1]
    return [(x, y) for (x, _), y in zip(kept, both_ways, strict=True)]


def _running_mean(values: Sequence[float]) -> list[float]:
    keep = math.exp(-1 / max(1.0, len(values) / 40))
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means


def spike_limit(values: Iterable[float]) -> float:
    """The value above which points are cut off; infinity if there are no spikes, or fewer than 20 values."""
    ordered = sorted(values)
    if len(ordered) < 20:
        return math.inf
    low, high = ordered[0], ordered[round(0.95 * (len(ordered) - 1))]
    if high == low or ordered[-1] - low <= SPIKE * (high - low):
        return math.inf
    return low + 2 * (high - low)


def make_axis(low: float, high: float, *, whole: bool = False, snug: bool = False) -> Axis:
    """An axis over the values with four to eight ticks at 1, 2 or 5 times a power of ten.

    Args:
        low, high: range of the values.
        whole: ticks at whole numbers only, for step numbers from 0.
        snug: end the axis at the values, not at the next tick.
    """
    if whole and high - low < 1:
        low, high = max(low - 1.0, 0.0), high + 1.0
    elif high - low <= max(1e-9 * max(abs(low), abs(high)), SMALLEST):
        margin = abs(high) * 0.1 if abs(high) > SMALLEST else 1.0
        low, high = low - margin, high + margin
    step = _round_step((high - low) / 5)
    if whole:
        step = max(step, 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if not snug:
        low, high = first * step, last * step
    ticks = tuple(n * step for n in range(first, last + 1) if low - 1e-9 * step <= n * step <= high + 1e-9 * step)
    return Axis(low, high, ticks, tuple(_tick_label(tick, step) for tick in ticks))


def _round_step(rough: float) -> float:
    """The next of 1, 2, 5, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= rough * (1 - 1e-9))


def _tick_label(value: float, step: float) -> str:
    """The same number of decimals on every tick, as the step needs; 2e-5 and 12k for very small and large steps."""
    if abs(value) < step / 2:
        return "0"
    if step >= 500:
        return format_count(round(value))
    if step < 0.0005:
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        return f"{value / 10.0**exponent:.3g}e{exponent}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _x(value: float, axis: Axis) -> float:
    return LEFT + INNER_WIDTH * (value - axis.low) / (axis.high - axis.low)


def _y(value: float, axis: Axis) -> float:
    return TOP + INNER_HEIGHT * (axis.high - value) / (axis.high - axis.low)


def _grid(x_axis: Axis, y_axis: Axis) -> Iterable[str]:
    right, bottom = LEFT + INNER_WIDTH, TOP + INNER_HEIGHT
    for value, label in zip(y_axis.ticks, y_axis.labels, strict=True):
        y = _y(value, y_axis)
        yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    for value, label in zip(x_axis.ticks, x_axis.labels, strict=True):
        x = _x(value, x_axis)
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    yield f'<text x="{right}" y="{HEIGHT - 5}" text-anchor="end">optimizer step</text>'


def _curve(series: Series, x_axis: Axis, y_axis: Axis, ceiling: float) -> str:
    drawn = []
    if series.look != "dots":
        points = _thin(series.points, MAX_LINE_POINTS)
        path = " ".join(f"{_x(x, x_axis):.1f},{_y(min(y, y_axis.high), y_axis):.1f}" for x, y in points)
        drawn.append(f'<polyline class="{series.colour} line" points="{path}"/>')
    if series.look != "line" or len(series.points) == 1:
        kind = "dot" if series.look == "dots" else "mark"
        radius = 2.2 if kind == "dot" else 3.5
        spikes = [point for point in series.points if point[1] > ceiling]
        for x, y in [*_thin([point for point in series.points if point[1] <= ceiling], MAX_DOTS), *spikes[:MAX_DOTS]]:
            tip = f"<title>step {x:g}: {y:.4g}</title>"
            left, top = _x(x, x_axis), _y(min(y, y_axis.high), y_axis)
            if y > ceiling:
                shape = f"M{left:.1f} {TOP - 5}l5 8h-10z"
                drawn.append(f'<path class="{series.colour} mark" d="{shape}">{tip}</path>')
            else:
                circle = f'class="{series.colour} {kind}" cx="{left:.1f}" cy="{top:.1f}" r="{radius}"'
                drawn.append(f"<circle {circle}>{tip}</circle>")
    return "".join(drawn)


def _thin(points: Points, most: int) -> Points:
    """At most about `most` points, evenly spaced, including the last one."""
    if len(points) <= most:
        return points
    every = math.ceil(len(points) / most)
    return [*points[:-1:every], points[-1]]


def _legend(series: Series) -> str:
    line = f'<polyline class="{series.colour} line" points="1,8 29,8"/>' if series.look != "dots" else ""
    dot = f'<circle class="{series.colour} mark" cx="15" cy="8" r="5"/>' if series.look == "marks" else ""
    if series.look == "dots":
        dot = "".join(f'<circle class="{series.colour} dot" cx="{x}" cy="8" r="4"/>' for x in (5, 15, 25))
    swatch = f'<svg class="chart" viewBox="0 0 30 16" aria-hidden="true">{line}{dot}</svg>'
    return f'<span class="legend">{swatch}{escape(series.name)}</span>'
