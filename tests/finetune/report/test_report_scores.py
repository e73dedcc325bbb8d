"""The task's score in the report: the table, and one chart of all of it."""

import json
import re
from typing import get_args

import pytest

from finetune.report import charts
from finetune.report import page as report_page
from finetune.report.charts import Colour
from finetune.report.report import write_report

SCORE = {
    "metric": "anls",
    "questions": 1200,
    "before": 0.5,
    "after": 0.91,
    "sources": {
        "boarding": {"questions": 600, "before": 0.02, "after": 0.89},
        "old": {"questions": 600, "before": 0.98, "after": 0.93},
    },
    "groups": {"form": {"questions": 30, "before": 0.25, "after": 0.5}},
}


def report(run, score=None, metrics=()) -> str:
    (run / "run.json").write_text(json.dumps({} if score is None else {"score": score}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    return write_report(run).read_text(encoding="utf-8")


def rows(html: str) -> list[list[str]]:
    return [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in re.findall("<tr>.*?</tr>", html)]


def figures(html: str) -> list[str]:
    return re.findall("<figure.*?</figure>", html)


def test_the_table_has_all_questions_then_each_source_and_group(tmp_path):
    html = report(tmp_path, SCORE)
    assert "<h2>Score: anls</h2>" in html
    assert rows(html) == [
        ["", "questions", "before training", "after training", "change"],
        ["all questions", "1,200", "0.5000", "0.9100", "+0.4100"],
        ["source boarding", "600", "0.0200", "0.8900", "+0.8700"],
        ["source old", "600", "0.9800", "0.9300", "-0.0500"],
        ["group form", "30", "0.2500", "0.5000", "+0.2500"],
    ]
    assert "Also in run.json" not in html  # the score has a place of its own


def test_a_run_that_goes_on_has_no_score_after_it(tmp_path):
    before = {key: value for key, value in SCORE.items() if key in ("metric", "questions", "before")}
    html = report(tmp_path, before | {"sources": {"old": {"questions": 600, "before": 0.98}}})
    assert rows(html)[1:] == [["all questions", "1,200", "0.5000", "", ""], ["source old", "600", "0.9800", "", ""]]


def test_without_a_task_there_is_no_table(tmp_path):
    assert "Score" not in report(tmp_path)


@pytest.mark.parametrize(
    "score",
    [
        *([], "0.5", {}, {"metric": {"a": 1}, "questions": "many", "before": None, "after": "1"}),
        {"sources": ["a"], "groups": {"a": 3}, "before": 1e400, "after": -1},
        {"sources": {"<script>": {"questions": 10**400, "before": "<b>", "after": True}}},
    ],
)
def test_whatever_is_written_as_score_there_is_a_report(tmp_path, score):
    html = report(tmp_path, score)
    assert "<script>" not in html and "<b>" not in html and "</html>" in html


def test_the_chart_has_all_questions_and_the_sources(tmp_path):
    metrics = [
        {"step": step, "eval_loss": 1.0, "eval_anls": 0.5, "eval_anls_boarding": step / 10, "eval_anls_images": 0.9}
        for step in (0, 5, 10)
    ]
    html = report(tmp_path, metrics=metrics)
    _, chart = figures(html)
    assert "<strong>Evaluation: anls</strong>" in chart and "from 0 to 1 over steps 0 to 10" in chart
    assert re.findall(r"</svg>([^<]+)</span>", chart) == ["all questions", "boarding", "images"]
    # The whole in the colour of evaluations, each source in one of its own.
    drawn = re.findall(r'<polyline class="(\w) line"', chart.split('role="img"')[1])
    assert drawn == ["b", "a", "c"]
    # One tile: what it consists of is in table and chart.
    assert re.findall(r'class="name">(Evaluation[^<]*)<', html) == ["Evaluation: anls"]


def test_sources_beyond_the_colours_have_charts_of_their_own(tmp_path):
    names = [f"s{number}" for number in range(7)]
    metrics = [{"step": 1, "eval_anls": 0.5} | {f"eval_anls_{name}": 0.1 for name in names}]
    titles = [re.search("<strong>(.*?)</strong>", figure)[1] for figure in figures(report(tmp_path, metrics=metrics))]
    assert titles == ["Evaluation: anls", "Evaluation: anls s5", "Evaluation: anls s6"]


def test_every_colour_is_in_the_style_of_light_and_dark_pages():
    for colour in get_args(Colour):
        assert report_page.STYLE.count(f"--series-{colour}: #") == 2
        for look in ("line", "mark", "dot"):
            assert re.search(rf"\.chart \.{colour}\.{look} {{[^}}]*var\(--series-{colour}\)", charts.STYLE)
