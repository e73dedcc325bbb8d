"""The table of a run's seconds by phase."""

import json
import math

import pytest

from finetune.report.phases import phases_table
from tests.finetune.report.test_report import report


def test_phases_have_a_place_of_their_own(tmp_path):
    phases = {
        "load": {"seconds": 65.4, "times": 1, "began": "2026-01-01T00:00:00.000+00:00", "ended": "2026-01-01"},
        "forward_backward": {"seconds": 196.2, "times": 40},
    }
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished", "phases": phases}))
    text = report(tmp_path).text
    assert "Where the time went" in text and "Also in run.json" not in text
    cells = [cell for tag, cell in report(tmp_path).texts if tag in ("td", "th")]
    assert cells[-8:] == ["load", "1m 05s", "25.0%", "1", "forward backward", "3m 16s", "75.0%", "40"]


@pytest.mark.parametrize(
    "phases",
    [None, 3, [], {}, {"a": 1}, {"a": {}}, {"a": {"seconds": "1"}}, {"a": {"seconds": True}}]
    + [{"a": {"seconds": value}} for value in (math.nan, math.inf, -1, 10**400)],
)
def test_what_is_no_time_is_left_out(phases):
    assert phases_table(phases) == ""


def test_a_run_too_short_to_measure():
    assert "0.0%" in phases_table({"<a>": {"seconds": 0.0}}) and "<a>" not in phases_table({"<a>": {"seconds": 0.0}})
