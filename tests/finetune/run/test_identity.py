"""The identity of a run."""

import json
import math

from finetune.run.identity import compare_runs

IDENTITY = {
    "recipe": {
        "model": {"path": "Qwen/Qwen-VL", "dtype": "bfloat16"},
        "adapter": {"r": 8, "targets": ["c_attn"]},
        "data": {"train": [{"path": "a.jsonl", "weight": 1.0}, {"path": "b.jsonl", "weight": 1.0}]},
        "evaluate": None,
        "output": "runs/a",
        "train": {"learning_rate": 1e-4, "logging_steps": 1},
    },
    "data": {"train": "1234"},
    "base": "abcd",
}


def test_a_run_is_equal_to_its_stored_self(run):
    run.write_run({"identity": IDENTITY})
    as_tuples = IDENTITY | {"recipe": IDENTITY["recipe"] | {"adapter": {"r": 8, "targets": ("c_attn",)}}}
    assert compare_runs(run.read_run()["identity"], as_tuples) == []
    assert compare_runs({"loss": math.nan}, {"loss": math.nan}) == []
    assert compare_runs({}, {}) == []


def test_every_difference_is_a_line():
    now = json.loads(json.dumps(IDENTITY))
    now["recipe"]["train"] |= {"learning_rate": 2e-4, "logging_steps": 5}
    now["recipe"]["data"]["train"][1]["path"] = "ć.jsonl"
    now["recipe"]["adapter"] = None
    now["recipe"]["evaluate"] = {"data": ["c.jsonl"], "patience": 2}
    now["recipe"]["output"] = "runs/b"
    now["recipe"]["freeze"] = {"vision": True, "resampler": {"queries": False}}
    del now["recipe"]["model"]["dtype"]
    now["base"] = "ef01"
    differences = compare_runs(IDENTITY, now, ignore=("recipe.output", "recipe.train.logging_steps"))
    assert differences == [
        'recipe.model.dtype: "bfloat16" -> (absent)',
        'recipe.adapter: {"r": 8, "targets": ["c_attn"]} -> null',
        'recipe.data.train[1].path: "b.jsonl" -> "ć.jsonl"',
        'recipe.evaluate: null -> {"data": ["c.jsonl"], "patience": 2}',
        "recipe.train.learning_rate: 0.0001 -> 0.0002",
        "recipe.freeze.vision: (absent) -> true",
        "recipe.freeze.resampler.queries: (absent) -> false",
        'base: "abcd" -> "ef01"',
    ]
    assert compare_runs(IDENTITY, now, ignore=("recipe", "base")) == []
    assert len(compare_runs(IDENTITY, now, ignore=("recipe.out", "recipe.train.logging"))) == len(differences) + 2


def test_lists_of_other_lengths_are_shown_whole():
    assert compare_runs({"a": [1, 2]}, {"a": [1]}) == ["a: [1, 2] -> [1]"]
    assert compare_runs({"a": []}, {}) == ["a: [] -> (absent)"]
    assert compare_runs({"a": {}}, {}) == ["a: {} -> (absent)"]
