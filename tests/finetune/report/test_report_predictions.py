"""Replies before and after with the task's verdict on them."""

import json
import re

import pytest
from PIL import Image

from finetune.report.images import SMALL, jpeg_settings
from finetune.report.report import write_report


def reply(when, prediction, score=None, *, row=1, target="$ 45.50", metric="anls", **more):
    record = {"when": when, "origin": f"row {row}", "question": "?", "target": target, "prediction": prediction}
    return record | ({} if score is None else {"score": score, "metric": metric}) | more


def report(run, *records) -> str:
    (run / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return write_report(run).read_text(encoding="utf-8")


def sides(html: str) -> list[str]:
    return re.findall("<section.*?</section>", html, re.DOTALL)


@pytest.mark.parametrize(
    ("score", "verdict"), [(0.0, "✗ wrong"), (0.8, "partly right"), (1.0, "✓ right"), (0.9999999999999, "✓ right")]
)
def test_the_score_says_what_is_right(tmp_path, score, verdict):
    html = report(tmp_path, reply("before", "45.50", score))
    (side, _) = sides(html)
    marks = re.findall(r'<span class="badge[^"]*">([^<]*)</span>', side)
    assert marks == [verdict, f"score {score:.4f}"]
    assert ('<section class="match">' in side) is (verdict == "✓ right")


def test_another_right_answer_is_right(tmp_path):
    html = report(tmp_path, reply("after", "45.5", 1.0, others=["45.5"]))
    _, side = sides(html)
    assert "✓ right" in side and "<del>" not in side and "also right: 45.5" in html


def test_right_ones_are_counted_and_the_choice_is_told(tmp_path):
    records = [reply("before", "a", 0.0, row=row) for row in (1, 2, 3)]
    records += [reply("after", "$ 45.50", score, row=row) for row, score in ((1, 1.0), (2, 0.7), (3, 1.0))]
    html = report(tmp_path, *records)
    assert "Right: 0 of 3 before, 2 of 3 after training." in html
    assert "one of each document" in html and "chosen before training, whatever the replies" in html


def test_a_metric_without_a_best_score_gives_no_verdict(tmp_path):
    html = report(tmp_path, reply("before", "a dog", 1.37, metric="cider_d", target="a cat"))
    (side, _) = sides(html)
    assert "differs" in side and "score 1.3700" in side and "right" not in side
    assert "Exact matches: 0 of 1 before training." in html


def test_the_source_is_named(tmp_path):
    html = report(tmp_path, reply("before", "a", 0.0, source="<boarding>"))
    assert "<header><span>row 1</span><span>&lt;boarding&gt;</span></header>" in html


def test_small_images_are_kept_nearly_as_they_are(tmp_path):
    """Letters one pixel wide, in red on blue: with the settings of large images they would run into each other."""
    image = Image.new("RGB", (140, 140), (30, 30, 200))
    for column in range(0, 140, 4):
        image.paste((220, 30, 30), (column, 0, column + 1, 140))
    worst = {}
    for name, settings in (("small", jpeg_settings(image, 80)), ("large", {"quality": 80})):
        image.save(tmp_path / f"{name}.jpg", "JPEG", **settings)
        stored = Image.open(tmp_path / f"{name}.jpg")
        worst[name] = max(abs(stored.getpixel((40, y))[0] - 220) for y in range(140))
    assert worst["small"] < 25 < worst["large"]
    assert jpeg_settings(Image.new("RGB", (10, SMALL + 1)), 80) == {"quality": 80}
