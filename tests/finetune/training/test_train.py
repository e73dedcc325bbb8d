"""Runs in this process: what a recipe's settings do to a run."""

import json
from pathlib import Path

import pytest
import torch
from recipes_for_tests import TINY, finetune, write_recipe, write_rows
from safetensors.torch import load_file
from said import collect

from finetune.cli import main
from finetune.errors import UserError
from finetune.recipe import load_recipe
from finetune.terminal import say_nothing
from finetune.training.train import train


def run(folder: Path, *overrides: str, **changes) -> tuple[Path, list[str]]:
    said: list[str] = []
    return train(load_recipe(write_recipe(folder, **changes), overrides), say=collect(said)), said


def with_evaluation(folder: Path, **evaluate) -> dict:
    data = {"path": str(folder / "eval.jsonl"), "format": "messages"}
    return {"evaluate": {"data": [data], "predictions": 0, **evaluate}}


def records(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_the_best_checkpoint_is_kept_and_patience_stops(tmp_path):
    """A learning rate that soon does harm: training stops early, and the result is the best checkpoint's."""
    finished, _ = run(
        tmp_path,
        **with_evaluation(tmp_path, patience=2),
        train__learning_rate=0.3,
        train__lr_scheduler_type="constant",
        train__max_steps=40,
        train__eval_strategy="steps",
        train__eval_steps=1,
        train__save_steps=1,
    )
    losses = {record["step"]: record["eval_loss"] for record in records(finished) if "eval_loss" in record}
    best = min(losses, key=losses.get)
    description = json.loads((finished / "run.json").read_text())
    assert description["steps"] == max(losses) == best + 2 < 40
    assert description["best_checkpoint"].endswith(f"step-{best}")
    stored, result = adapter_of(Path(description["best_checkpoint"])), adapter_of(finished / "adapter")
    assert stored.keys() == result.keys()
    assert all(torch.equal(stored[name], result[name]) for name in stored)


def test_patience_alone_keeps_the_best(tmp_path):
    """Evaluation and saving then follow the epochs, and the result is the best of them."""
    finished, _ = run(tmp_path, **with_evaluation(tmp_path, patience=1))
    assert json.loads((finished / "run.json").read_text())["best_checkpoint"] is not None


def test_checkpoints_beyond_the_limit_are_removed(tmp_path):
    finished, _ = run(tmp_path, train__save_steps=1, train__save_total_limit=3)
    assert {folder.name for folder in (finished / "checkpoints").iterdir()} == {"step-6", "step-7", "step-8"}


@pytest.mark.parametrize(
    "changes",
    [
        {"train__neftune_noise_alpha": 5.0},
        {"train__lr_scheduler_type": "cosine_with_min_lr", "train__lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"train__optim": "adafactor", "train__max_grad_norm": 0.5},
        {"train__gradient_checkpointing": True},
        {"model__dtype": "bfloat16", "freeze": {"resampler": False}},
        {"adapter": {"r": 4, "rslora": True, "dora": True, "init": "gaussian", "vision_targets": ["in_proj"]}},
        {"train__learning_rates": {"resampler": 1e-3, "adapter": 1e-2}, "freeze": {"resampler": False}},
        {"adapter": None, "freeze": {"vision": False, "language": False}, "train__vision_layer_decay": 0.9},
        {"model__attention": "eager", "data__packing": False, "data__labels": "structure", "data__workers": 2},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_settings_train(tmp_path, changes):
    finished, _ = run(tmp_path, train__max_steps=3, train__save_strategy="no", **changes)
    losses = [record["loss"] for record in records(finished) if "loss" in record]
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses)
    if "adapter" not in changes or changes["adapter"]:
        stored = {name: tensor.dtype for name, tensor in adapter_of(finished / "adapter").items()}
        # The position table is no weight: it keeps the base's type.
        assert {dtype for name, dtype in stored.items() if "pos_embed" not in name} == {torch.float32}


def test_the_loss_falls(tmp_path):
    finished, said = run(tmp_path, train__max_steps=16, train__save_strategy="no")
    losses = [record["loss"] for record in records(finished) if "loss" in record]
    assert losses[-1] < losses[0] / 2
    text = "\n".join(said)
    assert "14 of 14 rows" in text and "vision" in text and "frozen" in text and "random" in text


def test_a_model_trained_in_full_replies_as_its_base_does(tmp_path):
    """With a cache, and with the base's own settings of replies."""
    settings = {"adapter": None, "freeze": {"language": False}}
    finished, _ = run(tmp_path, train__max_steps=1, train__save_strategy="no", **settings)
    for file, key in (("config.json", "use_cache"), ("generation_config.json", "chat_format")):
        ours, base = (json.loads((folder / file).read_text()) for folder in (finished / "model", TINY))
        assert ours[key] == base[key] and base[key]


def test_an_optimizer_of_ones_own_takes_the_place_of_the_recipes(tmp_path):
    made = []

    def optimizer(model):
        made.append(torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.0))
        return made[0]

    recipe = load_recipe(write_recipe(tmp_path, train__max_steps=2))
    finished = train(recipe, say_nothing, optimizer=optimizer)
    assert made[0].param_groups[0]["params"][0].grad is None  # the trainer stepped it and emptied its gradients
    lora_b = [tensor for name, tensor in adapter_of(finished / "adapter").items() if "lora_B" in name]
    assert lora_b and not any(tensor.any() for tensor in lora_b)


def test_dropped_and_bad_rows_are_counted_and_listed(tmp_path):
    recipe = write_recipe(tmp_path, data__on_bad_row="skip", data__on_long="drop", data__max_length=400)
    rows = write_rows(tmp_path / "train.jsonl", 8).read_text().splitlines()
    rows[3] = json.dumps({"messages": [{"role": "user", "content": "?"}], "images": ["nowhere.png"]})
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    said: list[str] = []
    finished = train(load_recipe(recipe, ["train.max_steps=1"]), say=collect(said))
    counts = json.loads((finished / "run.json").read_text())["rows"]["train"]
    assert counts["total"] == 8 and counts["bad"] == 1 and counts["too_long"] > 0
    assert counts["kept"] == 8 - counts["bad"] - counts["too_long"]
    left_out = (finished / "left_out.jsonl").read_text().splitlines()
    assert len(left_out) == counts["bad"] + counts["too_long"]
    assert any("row 4" in json.loads(line)["origin"] for line in left_out)


def test_text_alone_teaches_the_vision_side_nothing(tmp_path):
    with pytest.raises(UserError, match="5 of the samples have no image"):
        run(tmp_path, adapter=None, freeze={"vision": False})


def test_an_adapter_is_no_base_to_train(tmp_path):
    finished, _ = run(tmp_path, train__max_steps=1)
    with pytest.raises(UserError, match="is an adapter"):
        run(tmp_path / "second", model__path=str(finished))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.learning_rat=1"], "did you mean train.learning_rate"),
        (["model.path=./nowhere"], "./nowhere: no such folder"),
        (["data.train.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["adapter.targets=[q_proj]"], "matches nothing"),
        ([f"model.path={TINY.parent}"], "neither config.json"),
    ],
)
def test_wrong_input_is_exit_code_2(tmp_path, capsys, overrides, message):
    assert main([str(write_recipe(tmp_path)), *overrides]) == 2  # a traceback would come as an exception
    assert message in capsys.readouterr().err


def test_wrong_input_is_told_without_a_traceback(tmp_path):
    done = finetune(write_recipe(tmp_path), "data.train.path=nowhere.jsonl", check=False)
    assert done.returncode == 2 and "nowhere.jsonl" in done.stderr and "Traceback" not in done.stderr


def test_help_and_no_arguments():
    assert "finetune RECIPE" in finetune("--help").stdout
    assert finetune(check=False).returncode == 2
