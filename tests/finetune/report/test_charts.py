"""Charts: axes, what is drawn, what cannot be."""

import math
import re

import pytest

from finetune.report.charts import HEIGHT, WIDTH, Series, line_chart, make_axis, smooth, spike_limit


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.52, 2.31, ["0.5", "1.0", "1.5", "2.0", "2.5"]),
        (0.0, 1e-4, ["0", "2e-5", "4e-5", "6e-5", "8e-5", "1e-4"]),
        (0.0, 1240.0, ["0", "500", "1.0k", "1.5k"]),
        (-0.3, 0.3, ["-0.4", "-0.2", "0", "0.2", "0.4"]),
        (3.0, 3.0, ["2.6", "2.8", "3.0", "3.2", "3.4"]),
        (0.0, 0.0, ["-1.0", "-0.5", "0", "0.5", "1.0"]),
    ],
)
def test_ticks_are_round_and_span_the_values(low, high, labels):
    axis = make_axis(low, high)
    assert list(axis.labels) == labels
    assert axis.low <= low <= high <= axis.high


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (1, 1000, ["200", "400", "600", "800", "1000"]),
        (0, 24, ["0", "5", "10", "15", "20"]),
        (1, 3, ["1", "2", "3"]),
        (7, 7, ["6", "7", "8"]),
        (0, 0, ["0", "1"]),
        (0, 50_000, ["0", "10.0k", "20.0k", "30.0k", "40.0k", "50.0k"]),
    ],
)
def test_steps_have_whole_ticks(low, high, labels):
    assert list(make_axis(low, high, whole=True, snug=True).labels) == labels


@pytest.mark.parametrize("low", [-1e30, -1.0, 0.0, 1e-300, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("span", [0.0, 1e-320, 1e-9, 1.0, 1e30])
def test_an_axis_exists_for_any_range(low, span):
    axis = make_axis(low, low + span)
    assert axis.low < axis.high and 0 < len(axis.ticks) <= 12


@pytest.mark.parametrize("low", [0, 1, 999, 10**12])
@pytest.mark.parametrize("span", [0, 1e-9, 1, 10**12])
def test_an_axis_of_steps_exists_for_any_range(low, span):
    axis = make_axis(low, low + span, whole=True, snug=True)
    assert 0 <= axis.low < axis.high and 0 < len(axis.ticks) <= 12


def coordinates(chart):
    for points in re.findall(r'points="([^"]*)"', chart):
        yield from (tuple(map(float, pair.split(","))) for pair in points.split())
    for x, y in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', chart):
        yield float(x), float(y)


def test_all_that_is_drawn_is_inside_the_chart():
    points = [(n, math.sin(n) * 1e-5) for n in range(5000)]
    for look in ("line", "dots", "marks"):
        chart = line_chart("A", [Series("a", points, look)], unit="b")
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in coordinates(chart))
        assert len(chart) < 60_000  # thousands of points are thinned out


def test_one_point_is_visible():
    chart = line_chart("A", [Series("a", [(5, 1.0)])], unit="b")
    assert "<title>step 5: 1</title>" in chart


def test_a_chart_without_points_is_an_error():
    with pytest.raises(ValueError, match="has no points"):
        line_chart("A", [Series("a", [])], unit="b")


def test_a_spike_does_not_flatten_the_rest():
    points = [(n, 1.0 + n % 7 / 10) for n in range(100)]
    assert spike_limit([y for _, y in points]) == math.inf
    points[40] = (40, 1e6)
    assert 1.6 < spike_limit([y for _, y in points]) < 5
    assert spike_limit([1.0] * 10 + [1e6]) == math.inf  # too few to tell
    chart = line_chart("A", [Series("raw", points, "dots"), Series("smooth", smooth(points))], unit="b")
    assert "1 above the chart" in chart and "<title>step 40: 1e+06</title>" in chart
    # The others still use most of the height.
    heights = [float(y) for y in re.findall(r'class="a dot" cx="[\d.]+" cy="([\d.]+)" r="2.2"', chart)]
    assert max(heights) - min(heights) > HEIGHT / 5
    assert all(value < 2 for _, value in smooth(points))


def test_smoothing_keeps_a_constant_and_does_not_lag():
    assert [y for _, y in smooth([(n, 2.0) for n in range(50)])] == pytest.approx([2.0] * 50)
    line = smooth([(n, float(n)) for n in range(400)])
    assert line[200] == pytest.approx((200, 200.0), abs=0.5)
    assert smooth([]) == [] and smooth([(1, 3.0)]) == [(1, 3.0)]
