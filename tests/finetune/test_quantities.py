"""Numbers as people read them: counts, bytes, durations, losses."""

import math

import numpy as np
import pytest

from finetune.quantities import (
    format_bytes,
    format_count,
    format_duration,
    format_learning_rate,
    format_loss,
    is_number,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *(
            (0, "0"),
            (0.0, "0"),
            (0.4217, "0.42"),
            (3.14, "3.1"),
            (9.96, "10"),
            (24, "24"),
            (950.4, "950"),
            (999, "999"),
        ),
        *((999.7, "1.0k"), (1000, "1.0k"), (1234.5, "1.2k"), (12_345, "12.3k"), (123_456, "123k"), (999_950, "1.0M")),
        *((9_656_000_000, "9.7B"), (5e15, "5000T"), (-1234, "-1.2k"), (math.nan, "nan"), (math.inf, "inf")),
    ],
)
def test_counts(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0 B"), (512, "512 B"), (999.9, "1.0 kB"), (512_000_000, "512 MB"), (5_300_000_000, "5.3 GB")),
        *((79_990_000_000, "80.0 GB"), (141e9, "141 GB"), (1.5e12, "1.5 TB"), (math.nan, "nan B")),
    ],
)
def test_bytes(value, text):
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0s"), (-3, "0s"), (45.9, "45s"), (60, "1m 00s"), (725, "12m 05s"), (3599.9, "59m 59s")),
        *((3600, "1h 00m"), (7478, "2h 04m"), (86_400, "1d 00h"), (3 * 86_400 + 4 * 3600 + 59, "3d 04h")),
        *((math.inf, "infs"), (math.nan, "nans")),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_losses_and_learning_rates():
    losses = [format_loss(value) for value in (1.23456, 0.0, 0.00012, 250_000.0, math.nan, -math.inf)]
    assert losses == ["1.2346", "0.0000", "1.20e-04", "2.50e+05", "nan", "-inf"]
    assert [format_learning_rate(value) for value in (1e-4, 2.5e-6, 0.0)] == ["1.00e-04", "2.50e-06", "0"]


def test_what_counts_as_a_number():
    assert [is_number(value) for value in (1, 1.5, math.nan, np.float32(1), True, "1", None)] == [
        *(True, True, True, True),
        *(False, False, False),
    ]
