"""The list of what a run has left out, as a run that goes on reads it."""

import json

import pytest

from finetune.errors import UserError
from finetune.run.left_out import read_left_out


def test_entries_by_part_and_sample(tmp_path):
    entry = {"origin": "rows.jsonl, row 5", "reason": "cannot be decoded", "data": "train", "sample": 4}
    of_the_check = {"origin": "rows.jsonl, row 7", "reason": "is blank", "data": "train"}
    lines = [json.dumps(entry), json.dumps(of_the_check), json.dumps(entry)[:30]]
    (tmp_path / "left_out.jsonl").write_text("\n".join(lines))
    assert read_left_out(tmp_path / "left_out.jsonl") == {"train": {4: entry}}
    assert read_left_out(tmp_path / "none.jsonl") == {}


def test_a_list_that_cannot_be_read_is_no_empty_one(tmp_path):
    (tmp_path / "left_out.jsonl").mkdir()
    with pytest.raises(UserError, match=r"left_out.jsonl cannot be read \(Is a directory\)"):
        read_left_out(tmp_path / "left_out.jsonl")
