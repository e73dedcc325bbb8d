"""Broken rows of every kind: each is accepted or reported with file, row, field and reason; none ends in a traceback.

`reliability/fuzz_data.py` does the same with more rows, and with images.
"""

import pytest
from broken_row_checks import check_broken_rows
from broken_rows import GOOD, KINDS, dumped

ROWS = {"messages": 3000, "qwen_json": 2000, "llava": 2000, "swift": 1500, "texts": 1000}
ROWS |= {"vqa": 1250, "grounding": 1000, "caption": 750, "fields": 750}


@pytest.mark.parametrize("row_format", ROWS)
def test_accepted_and_reported_are_all(tmp_path, tiny_processor, row_format):
    counts = check_broken_rows(tmp_path, row_format, ROWS[row_format], 0, tiny_processor.tokenizer)
    assert counts.total() == ROWS[row_format]
    assert {kind for kind, _ in counts} == set(KINDS) and len(KINDS) >= 25
    # Both happen in numbers, or this would show nothing.
    fates = {fate: sum(n for (_, f), n in counts.items() if f == fate) for fate in ("accepted", "reported")}
    assert min(fates.values()) > ROWS[row_format] / 20


@pytest.mark.parametrize("row_format", GOOD)
def test_the_rows_are_good_before_they_are_broken(tmp_path, tiny_processor, monkeypatch, row_format):
    monkeypatch.setattr("broken_rows.KINDS", {"whole": lambda draw, row: dumped(row)})
    counts = check_broken_rows(tmp_path, row_format, 20, 0, tiny_processor.tokenizer)
    assert counts == {("whole", "accepted"): 20}
