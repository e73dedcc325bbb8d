"""The check of all data: exact lengths and labels, every row accepted or reported, nothing else."""

import json
import os
import random

import numpy as np
import pytest
from sources_for_tests import source

from finetune.data import row_progress
from finetune.data.checks import checking
from finetune.data.checks.checking import check_samples
from finetune.data.sample import DataError
from finetune.data.samples import Samples
from qwenvl.text.chat import IGNORED, render_chat


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(question="Hi", answer="Hello", **row):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **row}


@pytest.fixture
def tokenizer(tiny_processor):
    return tiny_processor.tokenizer


@pytest.fixture
def check(tmp_path, tokenizer):
    """Check rows written to a file; returns what was found and the samples."""
    (tmp_path / "a.png").write_bytes(b"never opened")

    def run(rows, row_format="messages", **settings):
        samples = Samples([source(write(tmp_path / "train.jsonl", rows), row_format)])
        found = check_samples(samples, tokenizer, **{"max_length": None, "show_progress": False} | settings)
        return found, samples

    return run


def test_lengths_are_those_of_the_rendered_ids(check, tokenizer):
    rows = [
        chat(),
        chat("Longer " * 30, "So is this."),
        chat(images=["a.png", "a.png"]),
        {"messages": [*chat()["messages"], *chat("And?", "More.")["messages"]], "images": "a.png"},
    ]
    found, samples = check(rows, n_queries=16, labels="structure")
    rendered = [render_chat(s.messages, tokenizer, n_queries=16, labels="structure") for s in samples]
    assert found.kept.tolist() == [0, 1, 2, 3]
    assert found.lengths.tolist() == [len(r.ids) for r in rendered]
    assert found.supervised.tolist() == [r.supervised for r in rendered]
    assert found.images.tolist() == [0, 0, 2, 1]
    assert found.total == 4
    assert (found.problems, found.refused, found.dropped_long) == ([], 0, [])


def test_an_image_takes_258_tokens(check):
    found, _ = check([chat(), chat(images=["a.png"])])
    picture = "Picture 1:" + "\n"
    without = check([chat(picture + "Hi")])[0].lengths[0]
    assert abs(found.lengths[1] - 258 - without) <= 2


SCRIPTS = ["plain", "größer", "价格", "🙂", "<|im_end|>", "<img>x</img>", "\n\n", " ", "12,34", "e\u0301"]


def test_supervised_text_is_the_assistants_and_its_end(check, tokenizer):
    draw = random.Random(5)

    def text():
        return "x" + "".join(draw.choice(SCRIPTS) for _ in range(draw.randint(0, 6)))

    rows = []
    for _ in range(300):
        turns = [{"role": "system", "content": text()}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            turns += chat(text(), text())["messages"]
        rows.append({"messages": turns})
    found, samples = check(rows, markup_as_text=frozenset({"<img>", "<|im_end|>"}))
    assert len(found.kept) == 300
    for sample, supervised in zip(samples, found.supervised, strict=True):
        labels = [i for i in render_chat(sample.messages, tokenizer).labels if i != IGNORED]
        answers = [message["content"] for message in sample.messages if message["role"] == "assistant"]
        wanted = [i for answer in answers for i in [*tokenizer.encode_text(answer), tokenizer.im_end_id]]
        assert labels == wanted
        assert supervised == len(wanted)


def test_long_samples_are_dropped_and_counted(check):
    rows = [chat(), chat(images=["a.png"]), chat("Hi " * 400), chat()]
    lengths = check(rows)[0].lengths
    found, _ = check(rows, max_length=int(lengths[1]), on_long="drop")
    assert found.kept.tolist() == [0, 1, 3], "a sample of exactly the maximum stays"
    assert [(long.origin.row, long.tokens) for long in found.dropped_long] == [(3, lengths[2])]
    found, _ = check(rows, max_length=int(lengths[1]) - 1, on_long="drop")
    assert found.kept.tolist() == [0, 3]
    assert found.total == 4


def test_long_samples_are_an_error(check, tmp_path):
    with pytest.raises(DataError) as caught:
        check([chat(), chat("Hi " * 400), chat("Hi " * 500)], max_length=200)
    first, *rows = str(caught.value).splitlines()
    assert first.startswith("of 3 samples, 2 are too long, the longest has ")
    assert "raise max_length, leave them out with on_long: drop, or" in first
    assert rows[0].startswith(f"  {tmp_path / 'train.jsonl'}, row 2, length: ")
    assert rows[0].endswith("tokens, more than max_length=200")
    with pytest.raises(DataError, match="too long"):
        check([chat(), chat("Hi " * 400)], max_length=200, on_bad_row="skip")


REFUSED = [
    (chat(images=["gone.png"]), "images[0]", "there is no file"),
    (chat(images=["a.png", "../outside.png"]), "images[1]", "lies outside"),
    (chat(images=["fifo"]), "images[0]", "is not a regular file"),
    (chat(images=["https://example.org/a.png"]), "images[0]", "allow URLs"),
    ({"messages": [{"role": "user", "content": "Hi"}]}, "messages", "no assistant's turn"),
    (chat("Hi", "\ud800"), "messages", "surrogate"),
    (chat("Hi", " "), "messages[1].content", "is blank"),
    ({}, "messages", "is missing"),
]


def test_bad_rows_are_skipped_and_listed(check, tmp_path):
    (tmp_path.parent / "outside.png").write_bytes(b"image")
    os.mkfifo(tmp_path / "fifo")
    rows = [row for bad, _, _ in REFUSED for row in (chat(), bad)]
    for labels in ("assistant", "structure"):
        found, _ = check(rows, on_bad_row="skip", labels=labels)
        assert found.kept.tolist() == list(range(0, 2 * len(REFUSED), 2))
        assert found.refused == len(found.problems) == len(REFUSED)
        assert found.total == len(rows)
        for problem, (_, field, reason), row in zip(found.problems, REFUSED, range(2, 99, 2), strict=False):
            assert (problem.origin.row, problem.field) == (row, field)
            assert reason in problem.reason


def test_bad_rows_are_one_error_of_all(check, tmp_path):
    rows = [chat(), *[chat(answer="")] * 2345]
    with pytest.raises(DataError) as caught:
        check(rows)
    first, *listed, last = str(caught.value).splitlines()
    assert first.startswith(
        "of 2,346 samples, 2,345 cannot be used (fix them, or leave them out with on_bad_row: skip)"
    )
    assert len(listed) == 20
    assert listed[0] == f"  {tmp_path / 'train.jsonl'}, row 2, messages[1].content: is blank"
    assert last == "  ... and 2,325 more"
    assert len(caught.value.problems) == 2345


def test_no_sample_left_is_an_error(check):
    with pytest.raises(DataError, match="none of the 1 samples can be trained on"):
        check([chat(answer="")], on_bad_row="skip")


def test_a_row_of_several_samples_is_told_once(check, monkeypatch):
    monkeypatch.setattr(checking, "CHUNK", 2)
    bad = {"image": "a.png", "question": ["Q", "R", "S"], "answers": ["A", "B", ""]}
    good = {"image": "a.png", "question": "Q", "answers": "A"}
    found, samples = check([good, bad, good], "vqa", on_bad_row="skip")
    assert found.kept.tolist() == [0, 4]
    assert [(p.origin.row, p.field) for p in found.problems] == [(2, "answers[2]")]
    assert found.refused == 3
    assert found.total == len(samples) == 5


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<box>(1,2),(3,1000)</box>", "coordinate 1000 is outside 0..999"),
        ("<box>(9,9),(3,4)</box>", "wrong way round"),
        ("<box>(0.1,0.2),(0.3,0.4)</box>", "in integers"),
        ("<ref>dog", "has no </ref>"),
    ],
)
def test_malformed_grounding_is_refused(check, text, reason, everywhere):
    row = chat(answer=text)
    row["messages"][1]["grounding"] = not everywhere
    good = chat(answer="<box>(1,2),(3,4)</box>")
    good["messages"][1]["grounding"] = not everywhere
    found, _ = check([good, row], on_bad_row="skip", grounding=everywhere)
    assert found.kept.tolist() == [0]
    assert found.problems[0].field == "messages[1]"
    assert reason in found.problems[0].reason


def test_markup_of_other_text_is_text_where_the_rules_say_so(check):
    row = chat(answer="<box>(1,2),(3,1000)</box>")
    found, _ = check([row], on_bad_row="skip", markup_as_text=frozenset({"<box>"}))
    assert (found.kept.tolist(), found.markup) == ([0], {"<box>": 1})
    with pytest.raises(DataError, match=r"row 1, messages\[1\]: <box> looks like markup.*grounding: true"):
        check([row])


def test_the_result_does_not_depend_on_the_chunks(check, monkeypatch):
    rows = [chat("Hi " * (number % 90), images=["a.png"] * (number % 2)) for number in range(97)]
    rows[13] = rows[14] = rows[55] = {}
    results = []
    for size in (1, 7, 1000):
        monkeypatch.setattr(checking, "CHUNK", size)
        found, _ = check(rows, max_length=340, on_long="drop", on_bad_row="skip")
        assert found.total == 97
        arrays = [found.kept, found.lengths, found.images, found.supervised, found.source]
        results.append((*[a.tolist() for a in arrays], [p.args for p in found.problems], found.dropped_long))
    assert results[0] == results[1] == results[2]
    assert len(results[0][5]) == 3
    assert results[0][6]


def test_the_result_does_not_depend_on_the_processes(check, monkeypatch, tmp_path):
    monkeypatch.setattr(checking, "CHUNK", 8)
    rows = [chat("Hi " * (number % 90), images=["a.png"] * (number % 2)) for number in range(97)]
    rows[13] = rows[14] = rows[55] = {}
    rows[15] = chat(images=["gone.png"])
    rows[30]["messages"] = chat("Hi " * 400)["messages"] + rows[31]["messages"]

    def outcome(processes):
        rules = {"max_length": 340, "on_long": "drop_turns", "on_bad_row": "skip", "processes": processes}
        found, _ = check(rows, **rules)
        arrays = [found.kept, found.lengths, found.images, found.supervised, found.source]
        lists = [[p.args for p in found.problems], found.dropped_long, found.shortened]
        return (*[a.tolist() for a in arrays], *lists, found.refused, found.weights)

    serial = outcome(1)
    assert outcome(2) == serial
    assert len(serial[5]) == 4 and serial[6] and [one.origin.row for one in serial[7]] == [31]


def test_weights_repeat_the_samples_of_a_source(tmp_path, tokenizer):
    sources = [
        source(write(tmp_path / "a.jsonl", [chat()] * 4)),
        source(write(tmp_path / "b.jsonl", [chat()] * 4), weight=2.5),
        source(write(tmp_path / "c.jsonl", [{}, *[chat()] * 4]), weight=0.5),
        source(write(tmp_path / "d.jsonl", [chat()] * 2), weight=0),
    ]
    found = check_samples(Samples(sources), tokenizer, max_length=None, on_bad_row="skip", show_progress=False)
    assert found.source.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 2
    indices = found.weighted_indices(seed=0)
    assert indices == sorted(indices) == found.weighted_indices(seed=0)
    times = np.bincount(indices, minlength=15)
    assert times[:4].tolist() == [1] * 4
    assert sorted(times[4:8].tolist()) == [2, 2, 3, 3]
    assert times[8] == 0
    assert sorted(times[9:13].tolist()) == [0, 0, 1, 1]
    assert times[13:].tolist() == [0, 0]
    assert len({tuple(found.weighted_indices(seed)) for seed in range(20)}) > 1
    assert all(type(index) is int for index in indices)


def test_progress_is_plain_lines_without_a_terminal(check, monkeypatch, capsys):
    monkeypatch.setattr(checking, "CHUNK", 2)
    monkeypatch.setattr(row_progress, "QUIET_SECONDS", 0)
    monkeypatch.setattr(row_progress, "LINE_SECONDS", 0)
    check([chat()] * 5, show_progress=True)
    lines = capsys.readouterr().err.splitlines()
    starts = [f"checking data: {done} of 5 rows, " for done in (2, 4, 5)]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    check([chat()] * 5)
    assert capsys.readouterr().err == ""
