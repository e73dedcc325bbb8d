"""The report of a run folder: whole, self-contained, safe whatever the data holds, honest about what is missing."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from finetune.report.images import THUMBNAIL
from finetune.report.predictions import MAX_ROWS, compare, pair_rows
from finetune.report.report import read_curves, write_report
from qwenvl.images.drawing import PALETTE

VOID = {"meta", "br", "img", "hr", "link", "input"}
HOSTILE = '<script>alert(\'x\')</script>" onload="x" & </pre></style>\x00\x1b[31m\x85\u202e\ud800 ]]> é 总'
SHOWN = '<script>alert(\'x\')</script>" onload="x" & </pre></style>␀␛[31m\ufffd\ufffd\ufffd ]]> é 总'


class Document(HTMLParser):
    """A strict reading: every tag is closed in order. Keeps tags with attributes, and the text by enclosing tag."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self):
        return "".join(data for tag, data in self.texts if tag != "style")

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def images(self):
        opened = []
        for attributes in self.all("img"):
            kind, data = attributes["src"].split(",", 1)
            assert kind == "data:image/jpeg;base64"
            image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            image.load()
            assert (str(image.width), str(image.height)) == (attributes["width"], attributes["height"])
            opened.append(image)
        return opened


def report(run):
    path = write_report(run)
    assert path == run / "report.html"
    html = path.read_text(encoding="utf-8")
    document = Document(html)
    check_self_contained(html, document)
    return document


def check_self_contained(html, document):
    """Nothing runs, nothing is loaded, nothing is asked for over the network."""
    forbidden = {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "foreignobject",
        "use",
        "image",
        "video",
    }
    assert not forbidden & {tag for tag, _ in document.tags}
    for tag, attributes in document.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("style", "srcset", "background", "action", "xlink:href", "href"), (tag, name)
            if name == "src":
                assert tag == "img" and value.startswith("data:image/jpeg;base64,")
    style = "".join(data for tag, data in document.texts if tag == "style")
    assert not re.search(r"url\(|@import|expression", style)
    policy = next(meta["content"] for meta in document.all("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)


def write_lines(path, records, rest=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + rest)


def panels(run):
    """The HTML of each row of replies."""
    return re.findall(r"<article.*?</article>", write_report(run).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def run(tmp_path):
    """A run folder with everything."""
    run = tmp_path / "docvqa-lora"
    (run / "predictions").mkdir(parents=True)
    facts = {
        "status": "finished",
        "started": "2025-11-20T09:14:02+00:00",
        "finished": "2025-11-20T11:18:40+00:00",
        "wall_seconds": 7478.2,
        "model": "Qwen/Qwen-VL-Chat",
        "identity": {"recipe": {"seed": 1234567}, "base": "0123abcd"},
        "parameters": {
            "vision": {"trained": 0, "total": 1_937_000_000},
            "adapter": {"trained": 112_000_000, "total": 112_000_000},
        },
        "rows": {"train": {"total": 39_463, "kept": 39_391, "too_long": 64, "bad": 8}, "eval": {"kept": 200}},
        "packing_efficiency": 0.973,
        "environment": {"versions": {"torch": "2.13.0", "bitsandbytes": None}, "host": "node17"},
        "notes": ["The checkpoint's weights are random."],
        "best_checkpoint": "checkpoints/step-30",
    }
    (run / "run.json").write_text(json.dumps(facts))
    records = [{"step": 0, "eval_loss": 2.5, "eval_anls": 0.1, "eval_seconds": 3.0}]
    for step in range(1, 41):
        records.append(
            {
                "step": step,
                "epoch": step / 20,
                "loss": 2.5 - step / 20,
                "learning_rate": 1e-4 * (1 - step / 40),
                "grad_norm": 1.5 + step % 3 / 10,
                "tokens_per_second": 1200.0 + step,
                "images_per_second": 3.0,
                "peak_memory_bytes": 53_000_000_000,
            }
        )
    records += [{"step": 30, "eval_loss": 0.75, "eval_anls": 0.6}, {"step": 40, "eval_loss": 0.8, "eval_anls": 0.625}]
    records.sort(key=lambda record: record["step"])
    write_lines(run / "metrics.jsonl", records)
    (run / "recipe.yaml").write_text("model:\n  path: Qwen/Qwen-VL-Chat  # <the base> & more\n")
    Image.new("RGB", (1200, 900), "white").save(run / "predictions" / "ab12.jpg")
    row = {"origin": "eval.jsonl, row 3", "question": "What is the total?", "images": ["predictions/ab12.jpg"]}
    row["target"] = "$ 45.50"
    write_lines(
        run / "predictions.jsonl",
        [{**row, "when": "before", "prediction": "a cat"}, {**row, "when": "after", "prediction": "$ 45.50\n"}],
    )
    return run


def test_everything_is_there(run):
    document = report(run)
    headings = [data for tag, data in document.texts if tag in ("h1", "h2")]
    assert headings == [
        *("docvqa-lora", "Curves", "Replies before and after", "What was trained", "Recipe", "Environment"),
    ]
    for text in (
        *("Trained from Qwen/Qwen-VL-Chat on 39.4k rows", "started 2025-11-20 09:14 UTC", "2h 04m", "39,463", "97.3%"),
        *("2.4500 → 0.5000", "at step 30; first 2.5000, last 0.8000", "0.1000 → 0.6250", "epoch 2.00", "53.0 GB"),
        *("1.2k tokens/s", "3 images/s; medians", "torch2.13.0", "node17", "best_checkpoint", "0123abcd"),
        *("The checkpoint's weights are random.", "path: Qwen/Qwen-VL-Chat  # <the base> & more", "vision01.9B0.00%"),
        *("Exact matches: 0 of 1 before, 1 of 1 after training.", "eval.jsonl, row 3", "What is the total?"),
    ):
        assert text in document.text, text
    assert "Missing from this report" not in document.text
    assert "1234567" not in document.text  # the recipe is shown once, from its own file
    charts = [svg["aria-label"] for svg in document.all("svg") if svg.get("role") == "img"]
    assert charts == [
        "Loss, nats per supervised token: from 0.5 to 2.5 over steps 0 to 40",
        "Learning rate, of the first parameter group: from 0 to 9.75e-05 over steps 1 to 40",
        "Gradient norm, before clipping: from 1.5 to 1.7 over steps 1 to 40",
        "Throughput, tokens/s: from 1201 to 1240 over steps 1 to 40",
        "Images, images/s: from 3 to 3 over steps 1 to 40",
        "Evaluation: anls, score: from 0.1 to 0.625 over steps 0 to 40",
    ]


def test_pictures_are_small_and_inside(run):
    (image,) = report(run).images()
    assert image.size == (THUMBNAIL, THUMBNAIL * 900 // 1200)


def test_an_empty_folder(tmp_path):
    document = report(tmp_path)
    for name in ("run.json", "metrics.jsonl", "recipe.yaml", "predictions.jsonl"):
        assert f"{name}: there is none" in document.text
    assert "status unknown" in document.text


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run folder"):
        write_report(tmp_path / "none")


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "recipe.yaml", "predictions.jsonl"])
def test_each_file_may_be_missing_torn_or_something_else(run, name):
    whole = (run / name).read_bytes()
    for content in (
        None,
        b"",
        whole[:-7],
        b"\xff\xfe\x00garbage",
        b"[1, 2]\n",
        b"null\n",
        b'{"step": {}}\n',
        b"{" * 999,
    ):
        (run / name).unlink(missing_ok=True)
        if content is not None:
            (run / name).write_bytes(content)
        document = report(run)
        if content is None:
            assert f"{name}: there is none" in document.text
    (run / name).unlink()
    (run / name).mkdir()
    assert f"{name}: it cannot be read" in report(run).text


def test_torn_and_damaged_lines_are_counted(run):
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines + '{"step": 41, "lo')
    assert "metrics.jsonl: its last line is torn and was left out" in report(run).text
    (run / "metrics.jsonl").write_text("what?\n" + lines + "[]\n")
    document = report(run)
    assert "metrics.jsonl: 2 damaged line(s) left out (1, 45)" in document.text
    assert "2.4500 → 0.5000" in document.text


def test_hostile_text_stays_text(run):
    keys = ("status", "started", "finished", "model", "notes", "environment", "parameters", "rows", HOSTILE)
    facts = dict.fromkeys(keys, HOSTILE)
    Image.new("RGB", (8, 8)).save(run.parent / "outside.png")
    (run / "run.json").write_text(json.dumps({**facts, "wall_seconds": HOSTILE, "packing_efficiency": [HOSTILE]}))
    (run / "recipe.yaml").write_bytes(HOSTILE.encode("utf-8", "surrogatepass"))
    write_lines(run / "metrics.jsonl", [{"step": n, "loss": 1.0, f"eval_{HOSTILE}": 0.5} for n in range(3)])
    record = dict.fromkeys(("origin", "question", "target", "prediction"), HOSTILE)
    write_lines(
        run / "predictions.jsonl",
        [
            {**record, "when": "before", "images": [HOSTILE, "../outside.png", "http://localhost/a.png"]},
            {**record, "when": "after", "prediction": f"<mark>{HOSTILE}</mark>"},
            {"when": HOSTILE, "images": HOSTILE},
            {"when": ["before"], "target": {"a": 1}, "prediction": 5, "images": [None, {}]},
        ],
    )
    document = report(run)
    text = document.text
    assert text.count(SHOWN) >= 10
    assert "it lies outside the image root" in text and "URLs are not fetched here" in text
    assert document.images() == []


def test_hostile_structures_do_no_harm(run):
    for facts in (
        {"parameters": {"vision": 3, "x": {"trained": None}}, "rows": [], "notes": {"a": 1}, "environment": [1, [2]]},
        {"parameters": [], "rows": {"kept": 1}, "identity": 3, "wall_seconds": math.nan, "packing_efficiency": True},
        {
            "parameters": {"a": {"trained": 0, "total": 0}},
            "wall_seconds": 10**400,
            "started": 12,
            "model": {"path": "x"},
        },
        {"parameters": {"a": {"trained": 10**400, "total": 10**400}}, "rows": {"train": {"kept": 10**400}}},
    ):
        (run / "run.json").write_text(json.dumps(facts))
        report(run)


def test_numbers_that_are_none_are_said_and_not_drawn(run):
    values = [1.0, None, math.nan, "NaN", "Infinity", "much", 10**400, 1e300, 0.5, True]
    write_lines(run / "metrics.jsonl", [{"step": n, "loss": value} for n, value in enumerate(values)])
    document = report(run)
    assert "loss: 5 value(s) are not finite and not drawn" in document.text
    assert "1.0000 → 0.5000" in document.text
    chart = next(svg for svg in document.all("svg") if svg.get("role") == "img")
    assert chart["aria-label"] == "Loss, nats per supervised token: from 0.5 to 1 over steps 0 to 8"


def test_a_run_of_nothing_but_nan(run):
    write_lines(run / "metrics.jsonl", [{"step": n, "loss": math.nan, "eval_loss": math.nan} for n in range(3)])
    document = report(run)
    assert "nan → nan" in document.text
    assert not [svg for svg in document.all("svg") if svg.get("role") == "img"]


def test_what_a_resume_logged_again_replaces_what_was_there():
    records = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0, "grad_norm": 1.0}, {"step": 3, "loss": 2.0}]
    resumed = [{"step": 2, "loss": 3.5}, {"step": math.nan, "loss": 9.0}, {"loss": 9.0}, {"step": 4, "loss": 1.0}]
    curves = read_curves(records + resumed)
    assert curves == {"loss": [(1, 4.0), (2, 3.5), (4, 1.0)], "grad_norm": [(2, 1.0)]}


def test_the_report_is_replaced_whole_or_not_at_all(run, monkeypatch):
    before = write_report(run).read_bytes()
    names = sorted(path.name for path in run.iterdir())
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert sorted(path.name for path in run.iterdir()) == names


def test_the_same_folder_gives_the_same_report(run):
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


# --- replies ---------------------------------------------------------------------------------------------------------


def reply(when, prediction, *, row=1, target="$ 45.50", **more):
    return {"when": when, "origin": f"row {row}", "question": "?", "target": target, "prediction": prediction, **more}


def test_rows_are_paired_in_the_order_they_come():
    records = [reply("before", "a", row=2), reply("before", "b", row=1), reply("after", "c", row=1)]
    records += [reply("after", "d", row=1), reply("between", "e", row=1)]
    rows = pair_rows(records)
    assert [(row.origin, row.replies) for row in rows] == [
        ("row 2", {"before": "a"}),
        ("row 1", {"before": "b", "after": "d"}),
    ]
    assert rows[0].matches("before") is False


def test_an_exact_match_is_marked_and_only_that(run):
    write_lines(run / "predictions.jsonl", [reply("before", "$ 45.5"), reply("after", " $ 45.50\n")])
    (panel,) = panels(run)
    before, after = re.findall("<section.*?</section>", panel, re.DOTALL)
    assert "exact match" not in before and "differs" in before
    assert "exact match" in after and "differs" not in after


def test_missing_and_empty_replies_are_said(run):
    write_lines(run / "predictions.jsonl", [reply("after", "")])
    text = report(run).text
    assert "No reply was recorded." in text and "(empty)" in text and "0 of 1 after" in text


@pytest.mark.parametrize(
    ("target", "said", "html"),
    [
        ("a list of 14 items", "a list of 13 items", "a list of <del>14</del><mark>13</mark> items"),
        ("two red cats", "two cats", "two <del>red </del>cats"),
        ("two cats", "two <b> cats", "two <mark>&lt;b&gt; </mark>cats"),
        ("总金额是五元", "总金额是四元", "总金额是<del>五</del><mark>四</mark>元"),
        ("$ 45.50", "The total is 3", "The total is 3"),  # nothing in common: no marks
        ("word " * 700, "word " * 699, "word " * 699),  # too long to compare
        ("", "", ""),
    ],
)
def test_differences_are_marked(target, said, html):
    assert compare(target, said) == html


def test_boxes_of_target_and_reply_are_drawn_in_their_colours(run):
    target, before = "<box>(100,100),(400,400)</box>", "<box>(500,500),(900,900)</box>"
    images = ["predictions/ab12.jpg"]
    write_lines(
        run / "predictions.jsonl",
        [
            reply("before", before, target=target, images=images),
            reply("after", "no idea", target=target, images=images),
        ],
    )
    document = report(run)
    first, second = document.images()
    assert has_colour(first, (100, 100), PALETTE[0]) and has_colour(first, (500, 500), PALETTE[1])
    assert has_colour(second, (100, 100), PALETTE[0]) and not has_colour(second, (500, 500), PALETTE[1])
    assert "the reply has no box" in document.text
    fills = [rect["fill"] for rect in document.all("rect")]
    assert fills == [f"rgb{colour}" for colour in (PALETTE[0], PALETTE[1], PALETTE[0])]


def has_colour(image, corner, colour):
    """Whether the colour is near a corner given in thousandths; JPEG leaves no pixel exact."""
    left, top = corner[0] * image.width // 1000, corner[1] * image.height // 1000
    pixels = [image.getpixel((left + x, top + y)) for x in range(-3, 9) for y in range(-3, 9)]
    return any(sum(abs(a - b) for a, b in zip(pixel, colour, strict=True)) < 60 for pixel in pixels)


def test_boxes_are_not_drawn_where_it_is_unclear_on_which_image(run):
    images = ["predictions/ab12.jpg", "predictions/ab12.jpg"]
    write_lines(run / "predictions.jsonl", [reply("after", "<box>(1,1),(900,900)</box>", images=images)])
    document = report(run)
    assert len(document.images()) == 2 and not document.all("rect")
    assert all(image.getextrema() == ((255, 255),) * 3 for image in document.images())


def test_broken_images_are_said(run):
    (run / "predictions" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    write_lines(
        run / "predictions.jsonl",
        [reply("after", "a", images=["predictions/broken.jpg", "predictions/none.jpg", "predictions/ab12.jpg"])],
    )
    document = report(run)
    assert "No image: 'predictions/broken.jpg': " in document.text
    assert "No image: 'predictions/none.jpg': there is no such file" in document.text
    assert len(document.images()) == 1


def test_many_rows_are_cut_and_counted(run):
    write_lines(run / "predictions.jsonl", [reply("after", "$ 45.50", row=n) for n in range(MAX_ROWS + 5)])
    document = report(run)
    assert f"{MAX_ROWS + 5} of {MAX_ROWS + 5} after training" in document.text
    assert f"The first {MAX_ROWS} of {MAX_ROWS + 5} rows are shown" in document.text
    assert len(document.all("article")) == MAX_ROWS
