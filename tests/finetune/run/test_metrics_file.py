"""`metrics.jsonl`: every line is JSON, and a killed process leaves at most a half last one."""

import json
import math
import re

import pytest

from finetune.errors import UserError


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_metrics(run):
    assert run.read_metrics() == []
    records = [
        {"step": 1, "loss": 2.5, "note": "a\u2028b\nc"},
        {"step": 2, "loss": math.inf, "grad_norm": -math.inf, "deep": {"values": [0.0, math.inf]}},
        {"step": 3, "loss": 1e-300},
    ]
    for record in records:
        run.append_metrics(record)
    assert run.read_metrics() == records
    lines = run.metrics_file.read_bytes().decode().split("\n")
    assert len(lines) == 4
    assert [json.loads(line, parse_constant=refuse) for line in lines[:3]][1]["loss"] == "Infinity"


def test_not_a_number_in_metrics(run):
    run.append_metrics({"step": 1, "loss": math.nan})
    assert run.metrics_file.read_text() == '{"step": 1, "loss": "NaN"}\n'
    assert math.isnan(run.read_metrics()[0]["loss"])


def test_a_half_last_line_is_left_out_and_said(run, caplog):
    line = json.dumps({"step": 2, "loss": 1.5, "note": "é" * 5000}, ensure_ascii=False).encode()
    for size in (1, 7, 5000, 5001, len(line)):
        run.metrics_file.write_bytes(b'{"step": 1}\n' + line[:size])
        caplog.clear()
        assert run.read_metrics() == [{"step": 1}]
        assert f"left out its half last line ({size} bytes)" in caplog.text
        run.append_metrics({"step": 2})
        assert f"removed its half last line ({size} bytes)" in caplog.text
        assert run.metrics_file.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
        run.metrics_file.write_bytes(line[:size])  # a first line
        run.append_metrics({"step": 2})
        assert run.metrics_file.read_bytes() == b'{"step": 2}\n'


@pytest.mark.parametrize("line", ["{", "[1]", "", "\0\0", '{"step": 2} {"step": 3}'])
def test_another_bad_line_is_an_error(run, line):
    run.metrics_file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=re.escape(f"{run.metrics_file}, line 2: not a JSON object")):
        run.read_metrics()


def test_forgetting_the_steps_that_will_be_repeated(run):
    assert run.forget_metrics_after(0) == 0
    records = [{"note": "no step"}, *({"step": step, "loss": math.inf} for step in (10, 20, 20, 30, 25))]
    for record in records:
        run.append_metrics(record)
    assert run.forget_metrics_after(30) == 0
    assert run.forget_metrics_after(20) == 2
    assert run.read_metrics() == records[:4]
    assert run.forget_metrics_after(0) == 3
    assert run.read_metrics() == records[:1]
    assert [path.name for path in run.path.iterdir()] == ["metrics.jsonl"]
