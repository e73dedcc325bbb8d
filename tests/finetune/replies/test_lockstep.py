"""Replies of a model that is sharded over processes are those of one process, and none waits for ever."""

import json

import pytest
from forked_ranks import on_ranks
from recipes_for_tests import TINY
from sharded_tiny import fail_together, ids_of, prompts_for, reply_sharded, tiny_model

from finetune.replies.lockstep import is_sharded
from qwenvl import load_processor

CASES = [
    {"name": "uneven", "adapter": False, "prompts": {"count": 7}},
    {"name": "fewer-than-processes", "adapter": False, "prompts": {"count": 1}},
    {"name": "none", "adapter": False, "prompts": {"count": 0}},
    {"name": "text", "adapter": False, "prompts": {"count": 3, "text_only": True}},
    {"name": "unreadable", "adapter": False, "prompts": {"count": 4, "broken": 1}},
    {"name": "adapter", "adapter": True, "prompts": {"count": 5}},
]


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_sharded_replies_are_those_of_one_process(tmp_path, processes):
    on_ranks(processes, reply_sharded, str(tmp_path), CASES)
    processor = load_processor(TINY)
    for case in CASES:
        model = tiny_model(adapter=case["adapter"])
        assert not is_sharded(model)
        expected = ids_of(model, processor, prompts_for(processor, **case["prompts"]), on_bad_image="wrong")
        found = {}
        for rank in range(processes):
            found |= json.loads((tmp_path / f"{case['name']}-{rank}.json").read_text())
        assert found == {str(index): ids for index, ids in expected.items()}, case["name"]
        assert len(found) == case["prompts"]["count"]


def test_all_stop_when_one_process_fails(tmp_path):
    on_ranks(2, fail_together, str(tmp_path))
    theirs, own = ((tmp_path / f"raised-{rank}").read_text() for rank in (0, 1))
    assert own.startswith("False ") and "gone.png" in own  # an ImageError
    assert theirs == f"True process 1: {own.removeprefix('False ')}"
