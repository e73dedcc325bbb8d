"""The bench's rows and tables: what follows from what was measured, and "-" for what was not."""

import json

import pytest

from finetune.bench.table import COLUMNS, Row, as_json, cells, in_words, markdown, speed_up, terminal_table

OURS = Row(
    "qlora",
    "ours",
    "512",
    tokens=16_384,
    forwards=8,
    seconds=(1.0, 1.5, 1.5, 2.0),
    peak=6_000_000_000,
    reserved=6_500_000_000,
    plan=6_300_000_000,
    useful=300_000_000_000_000,
    executed=450_000_000_000_000,
    peak_flops=100e12,
    switches={"attention": "varlen", "optim": "paged_adamw_8bit", "reasons": ["because"]},
)
PUBLISHED = Row(
    "qlora",
    "published",
    "512",
    padded_to=512,
    tokens=16_384,
    forwards=32,
    seconds=(6.0, 6.0, 6.0, 6.0),
    peak=13_000_000_000,
    reserved=14_000_000_000,
    useful=320_000_000_000_000,
    executed=600_000_000_000_000,
    peak_flops=100e12,
)
NO_ROOM = Row("qlora", "published", "2048", padded_to=2048, note="out of memory (CUDA out of memory. Tried | 2 GiB)")
ROWS = [OURS, PUBLISHED, Row("qlora", "ours", "2048", plan=7_000_000_000, note="out of memory (x)"), NO_ROOM]


def test_what_follows_from_what_was_measured():
    assert OURS.seconds_per_step == 1.5 and OURS.tokens_per_second == pytest.approx(16_384 / 6)
    assert OURS.useful_share == pytest.approx(0.5) and OURS.executed_share == pytest.approx(0.75)
    assert OURS.plan_error == pytest.approx(0.05)
    assert speed_up(OURS, ROWS) == 4.0 and speed_up(PUBLISHED, ROWS) is None
    assert speed_up(OURS, [OURS]) is None and speed_up(ROWS[2], ROWS) is None


def test_a_line_has_every_column():
    filled = dict(zip(COLUMNS, cells(OURS, ROWS), strict=True))
    assert filled == {
        "weights": "qlora",
        "settings": "ours",
        "samples": "512",
        "forwards": "2",
        "peak": "6.0 GB",
        "reserved": "6.5 GB",
        "s / 8": "1.5",
        "tokens/s": "2.7k",
        "useful": "50 %",
        "executed": "75 %",
        "plan": "6.3 GB",
        "error": "+5.0 %",
        "speed-up": "4.00x",
    }
    assert cells(PUBLISHED, ROWS)[-3:] == ["-", "-", "-"]


def test_what_did_not_fit_is_a_row_that_says_so():
    assert cells(NO_ROOM, ROWS) == ["qlora", "published", "2048", *["-"] * (len(COLUMNS) - 3)]
    assert cells(ROWS[2], ROWS)[10:] == ["7.0 GB", "-", "-"]
    assert in_words(NO_ROOM) == f"qlora, published, 2048: {NO_ROOM.note}"
    assert f"qlora, published, 2048: {NO_ROOM.note}" in terminal_table(ROWS)


def test_the_terminal_table_is_aligned():
    lines = terminal_table(ROWS)[: len(ROWS) + 1]
    assert len({len(line) for line in lines}) == 1
    assert all(line[len("weights") : len("weights") + 2] == "  " for line in lines)


def test_settings_that_were_settled_are_told_once():
    rows = [OURS, Row(**{**vars(OURS), "samples": "mix"}), PUBLISHED]
    lines = [line for line in terminal_table(rows) if "varlen" in line]
    assert lines == ["qlora, ours, 512 mix: attention varlen, optim paged_adamw_8bit"]


def test_markdown_is_a_table_with_its_facts():
    page = markdown("finetune bench x.yaml", {"device": "NVIDIA H200"}, ROWS)
    assert page.startswith("# finetune bench x.yaml\n\n- device: NVIDIA H200\n")
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(ROWS) and {line.count("|") for line in table} == {len(COLUMNS) + 1}
    assert all(f"**{column}**" in page for column, text in COLUMNS.items() if text)


def test_the_json_has_nulls_where_nothing_was_measured():
    records = json.loads(json.dumps(as_json(ROWS)))
    assert records[0]["speed_up"] == 4.0 and records[0]["seconds"] == [1.0, 1.5, 1.5, 2.0]
    assert records[3]["seconds_per_step"] is None and records[3]["peak"] is None and records[3]["note"]
