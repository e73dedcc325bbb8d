"""Both parts of a recipe's data read at once, with all that is wrong told together; and what is said of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from recipes_for_tests import write_recipe

from finetune.data.reading import look_at_data, read_checked
from finetune.data.sample import BadRow, DataError, Origin
from finetune.data.summary import count_sources, problem_kinds
from finetune.errors import MissingFileError
from finetune.recipe import load_recipe


def write(path, answers, **settings):
    turns = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}] for answer in answers]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return {"path": str(path), "format": "messages", **settings}


@pytest.fixture
def recipe(tmp_path):
    def make(train, evaluate=None, **changes):
        evaluate = None if evaluate is None else {"data": evaluate}
        return load_recipe(write_recipe(tmp_path, data__train=train, evaluate=evaluate, **changes))

    return make


def test_both_parts_are_read(recipe, tmp_path, tiny_processor):
    train, evaluate = write(tmp_path / "t.jsonl", "abc"), write(tmp_path / "e.jsonl", "d")
    read = read_checked(recipe(train, evaluate), tiny_processor, show_progress=False)
    assert {name: (len(samples), len(checked.kept)) for name, (samples, checked) in read.items()} == {
        "train": (3, 3),
        "eval": (1, 1),
    }
    assert list(read_checked(recipe(train), tiny_processor, show_progress=False)) == ["train"]


def test_a_single_error_is_raised_as_it_is(recipe, tmp_path, tiny_processor):
    missing = {"path": str(tmp_path / "gone.jsonl"), "format": "messages"}
    with pytest.raises(MissingFileError, match=r"gone\.jsonl"):
        read_checked(recipe(missing), tiny_processor, show_progress=False)
    with pytest.raises(DataError, match="of 2 samples, 1 cannot be used") as caught:
        read_checked(recipe(write(tmp_path / "t.jsonl", ["", "a"])), tiny_processor, show_progress=False)
    assert len(caught.value.problems) == 1


def test_errors_of_all_parts_are_raised_together(recipe, tmp_path, tiny_processor):
    missing = {"path": str(tmp_path / "gone.jsonl"), "format": "messages"}
    empty = {"path": str(tmp_path / "empty.jsonl"), "format": "messages"}
    (tmp_path / "empty.jsonl").write_text("")
    both = recipe([missing, write(tmp_path / "t.jsonl", ["a", ""]), empty], write(tmp_path / "e.jsonl", ["", "a", ""]))
    with pytest.raises(DataError) as caught:
        read_checked(both, tiny_processor, show_progress=False)
    told = [line for line in str(caught.value).splitlines() if not line.startswith("  ")]
    assert [line.split(":")[0] for line in told] == ["train data"] * 3 + ["eval data"]
    assert "gone.jsonl" in told[0] and "holds no rows" in told[1]
    assert "of 2 samples, 1 cannot be used" in told[2] and "of 3 samples, 2 cannot be used" in told[3]
    part = look_at_data(both, tiny_processor, show_progress=False)["train"]
    assert [source.path for source in part.sources] == [str(tmp_path / "t.jsonl")]
    assert part.checked.kept.tolist() == [0]


def test_sources_are_counted_as_an_epoch_draws_them(recipe, tmp_path, tiny_processor):
    sources = [
        write(tmp_path / "a.jsonl", ["a"] * 5, weight=2.5),
        write(tmp_path / "b.jsonl", ["b", "", "b"], weight=0.34),
        write(tmp_path / "c.jsonl", ["c"] * 2),
    ]
    read = read_checked(recipe(sources, data__on_bad_row="skip"), tiny_processor, show_progress=False)
    samples, checked = read["train"]
    counts = count_sources(samples, checked)
    assert [(count.total, count.kept) for count in counts] == [(5, 5), (3, 2), (2, 2)]
    assert sum(count.tokens for count in counts) == checked.lengths.sum()
    assert [count.an_epoch for count in counts] == [12.5, 0.68, 2]
    assert [count.times for count in counts] == [", x 2.5 = 12.5 an epoch", ", x 0.34 = 0.68 an epoch", ""]
    assert len(checked.first_epoch(seed=1)) == 16, "15.18, and what is missing to a whole number"
    once = replace(checked, redraws=False)
    drawn = np.searchsorted([5, 8, 10], once.weighted_indices(seed=1), side="right")
    assert [count.an_epoch for count in count_sources(samples, once)] == np.bincount(drawn, minlength=3).tolist()


def test_problems_of_a_kind_are_counted_together():
    def problem(field, reason):
        return BadRow(Origin("a.jsonl", 1), field, reason)

    problems = [
        problem("images[0]", "there is no file '/a/b.png'"),
        problem("images[12]", 'there is no file "/a/it\'s.png"'),
        problem("length", "1,042 tokens, more than max_length=300"),
        problem("length", "512 tokens, more than max_length=300"),
        problem("images[1]", "there is no file 'c\\'d.png'"),
        problem("messages[3].content", "is blank"),
    ]
    assert problem_kinds(problems) == [
        ("images[]: there is no file …", 3),
        ("length: … tokens, more than max_length=…", 2),
        ("messages[].content: is blank", 1),
    ]
