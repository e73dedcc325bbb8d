"""Samples beyond `seq_length`: evaluated with stretched positions, trained without, and said so wherever a loss is."""

import json
import shutil

from recipes_for_tests import TINY, write_recipe
from said import collect

from finetune.check.check import check
from finetune.recipe import load_recipe
from finetune.training.train import train

NOTE = "losses of training and evaluation are not of the same computation"


def test_it_is_said_at_the_start_in_the_evaluation_and_in_the_report(tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"seq_length": 64}))
    evaluation = {"data": [{"path": str(tmp_path / "eval.jsonl"), "format": "messages"}], "predictions": 0}
    settings = {"model__path": str(base), "evaluate": evaluation, "train__max_steps": 1}
    recipe = load_recipe(write_recipe(tmp_path, **settings), ["train.save_strategy=no"])
    said: list[str] = []
    run = train(recipe, say=collect(said))

    assert sum("not in training (both as published)" in line for line in said) == 2  # of both parts of the data
    assert any("data.max_length: 64 with data.on_long: drop leaves them out" in line for line in said)
    assert any(line.startswith("eval loss") and "with stretched positions" in line for line in said)
    line = next(line for line in capsys.readouterr().out.splitlines() if "eval loss" in line)
    metrics = [json.loads(one) for one in (run / "metrics.jsonl").read_text().splitlines()]
    long = next(record["eval_long_samples"] for record in metrics if "eval_long_samples" in record)
    assert 0 < long <= 4 and f"({long} of 4 samples beyond seq_length" in line
    assert f"{long} of the 4 evaluation samples" in (notes := json.loads((run / "run.json").read_text())["notes"])[-1]
    assert NOTE in notes[-1] and NOTE in (run / "report.html").read_text()
    check(recipe, samples=0)
    assert "not in training (both as published)" in capsys.readouterr().out

    short = load_recipe(write_recipe(tmp_path / "short", **settings | {"model__path": str(TINY)}))
    said.clear()
    run = train(short, say=collect(said))
    assert not any("seq_length" in line for line in said) and NOTE not in (run / "report.html").read_text()
