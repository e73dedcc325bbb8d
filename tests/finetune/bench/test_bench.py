"""`finetune bench`: the trainer itself is run and measured, every column is filled, and what does not fit is a row."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipes_for_tests import ROOT, TINY, finetune, write_recipe
from torch.utils.flop_counter import FlopCounterMode

from finetune.bench.arithmetic import Trained, image_flops
from finetune.bench.bench import Bench, bench, make_ways
from finetune.bench.card_speed import Peak
from finetune.bench.flops import useful_flops
from finetune.bench.run import run_row
from finetune.bench.subject import Subject, find_subject
from finetune.bench.table import NOT_MEASURED, Row
from finetune.bench.workload import Lengths
from finetune.cli import main
from finetune.recipe import load_recipe
from finetune.terminal import labelled, say_nothing
from finetune.training.trainer import QwenVLTrainer
from qwenvl import QwenVLConfig

CPU = torch.device("cpu")
SHORT = {"data__max_length": 330, "train__per_device_train_batch_size": 4}


def wanted(folder: Path, *overrides: str, **how) -> Bench:
    recipe = load_recipe(write_recipe(folder, **SHORT), overrides)
    return Bench(recipe, "recipe.yaml", **{"lengths": ("mix",), "steps": 1, **how})


def one_row(folder: Path, *overrides: str, settings: str = "ours", samples: str = "mix", steps: int = 1) -> Row:
    asked = wanted(folder, *overrides, settings=(settings,))
    (way,) = make_ways(asked, find_subject(asked.recipe, "recipe"), CPU, Peak(1e12, "a number"))
    return run_row(way, samples, warm_up=2, steps=steps)


def test_the_command_fills_every_column(tmp_path):
    done = finetune(
        *("bench", "recipes/quickstart.yaml", "--steps", "1", "--lengths", "mix", "--to", tmp_path / "out"),
        *("data.max_length=320", "data.vision_cache=off", "model.path=examples/tiny"),
        cwd=ROOT,
    )
    assert "row 2/2     lora, published, mix: " in done.stdout and "Warning" not in done.stdout
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert record["facts"]["model"].startswith("examples/tiny's sizes") and record["facts"]["date"]
    assert record["environment"]["versions"]["torch"] == torch.__version__
    ours, published = record["rows"]
    for row, name in ((ours, "ours"), (published, "published")):
        assert (row["weights"], row["settings"], row["samples"]) == ("lora", name, "mix")
        assert len(row["seconds"]) == 1 and row["seconds_per_step"] > 0 and row["tokens_per_second"] > 0
        assert row["peak"] > 8e6 and row["reserved"] is None and 0 < row["useful_share"] < row["executed_share"]
        assert 8 * 287 < row["tokens"] <= 8 * 320
    assert ours["padded_to"] is None and published["padded_to"] == 320
    # The plan counts all but the batches that wait, which are a large part of so small a step.
    assert abs(ours["plan_error"]) < 0.15 and published["plan"] is None
    assert ours["speed_up"] > 0 and published["speed_up"] is None
    table = [line for line in (tmp_path / "out" / "bench.md").read_text().splitlines() if line.startswith("| lora")]
    cells = [line.strip("| ").split(" | ") for line in table]
    # The CPU has no allocator that reserves; the published settings have no plan, so no error of it, and no speed-up.
    assert [row.count(NOT_MEASURED) for row in cells] == [1, 4]


@pytest.mark.parametrize("settings", ["ours", pytest.param("published", marks=pytest.mark.slow)])
def test_the_executed_operations_are_those_that_are_counted(tmp_path, monkeypatch, settings):
    """All of the trainer's steps: packs of two samples, or padded ones one by one."""
    counter, train = FlopCounterMode(display=False), QwenVLTrainer.train

    def counted(self):
        with counter:
            train(self)

    monkeypatch.setattr(QwenVLTrainer, "train", counted)
    overrides = ("model.attention=eager", "data.tokens_per_batch=700", "train.gradient_checkpointing=true")
    row = one_row(tmp_path, *overrides, settings=settings, samples="310")
    assert row.forwards_per_step == (4 if settings == "ours" else 8)
    assert counter.get_total_flops() == 3 * row.executed and row.useful < row.executed


def test_the_trainer_follows_the_recipe(tmp_path, monkeypatch):
    """Optimizer, packing and batch size of the timed run are the recipe's; 8 samples are a step."""
    seen, train = {}, QwenVLTrainer.train

    def note(self):
        train(self)
        seen["optimizer"] = type(self.optimizer.optimizer).__name__
        seen["budget"] = self.train_budget.tokens
        seen["batch"] = (self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps)
        seen["steps"] = self.state.global_step

    monkeypatch.setattr(QwenVLTrainer, "train", note)
    one_row(tmp_path, "train.optim=sgd", "data.tokens_per_batch=640")
    assert seen == {"optimizer": "SGD", "budget": 640, "batch": (4, 2), "steps": 3}


@pytest.mark.parametrize(("wished", "batch"), [(1, 1), (2, 2), (8, 8), (3, 8), (16, 8)])
def test_a_step_is_8_samples_whatever_the_batch(tmp_path, wished, batch):
    asked = wanted(tmp_path, f"train.per_device_train_batch_size={wished}")
    ours, published = make_ways(asked, find_subject(asked.recipe, "recipe"), CPU, Peak(1e12, "a number"))
    assert ours.batch == batch and published.batch == 1


def test_with_a_vision_cache_the_tower_is_gone(tmp_path):
    row = one_row(tmp_path, "data.vision_cache=memory", samples="310")
    config = QwenVLConfig.from_pretrained(TINY)
    trained = Trained(lora=4 * 2 * sum((256 + 768, 256 + 256, 2 * (256 + 256))))
    samples = [Lengths(310, 26, 1)] * 8
    assert row.useful == useful_flops(config, trained, samples, encodes=False)
    assert row.useful == useful_flops(config, trained, samples) - 8 * image_flops(config) - 2 * 256 * 256**2


def test_both_are_lora_and_qlora(tmp_path):
    asked = wanted(tmp_path, both=True, settings=("ours",))
    rows = bench(asked, tmp_path / "out", say=say_nothing)
    assert [row.weights for row in rows] == ["lora", "qlora"]
    assert rows[1].peak < rows[0].peak


def test_what_does_not_fit_is_a_row_and_the_rest_is_measured(tmp_path, monkeypatch):
    make = Subject.make_model
    calls = []

    def fails_first(self, recipe, device):
        calls.append(recipe)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full. And more.")
        return make(self, recipe, device)

    monkeypatch.setattr(Subject, "make_model", fails_first)
    said: list[str] = []
    rows = bench(
        wanted(tmp_path, settings=("ours",), lengths=("300", "mix")),
        tmp_path / "out",
        lambda *line: said.append(labelled(*line)),
    )
    assert rows[0].note.startswith("out of memory (CUDA out of memory") and not rows[0].seconds and rows[0].plan
    assert rows[1].seconds and not rows[1].note
    assert "300: out of memory" in (tmp_path / "out" / "bench.md").read_text()
    assert any(line.startswith("row 1/2") and "out of memory" in line for line in said)


def test_on_a_machine_without_the_memory_nothing_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.bench.run.free_device_memory", lambda: 10_000_000)
    row = one_row(tmp_path)
    assert row.note.startswith("not tried: it needs") and row.plan > 10_000_000 and not row.seconds


def test_published_checkpoints_need_no_network(tmp_path):
    asked = wanted(tmp_path, "model.path=Qwen/Qwen-VL", "model.dtype=auto")
    subject = find_subject(asked.recipe, "recipe")
    assert subject.parameters() == 9_656_935_168 and subject.dtype(asked.recipe) == torch.bfloat16
    assert subject.settled(asked.recipe).adapter.train_embeddings is True
    chat = replace(asked, recipe=load_recipe(tmp_path / "recipe.yaml", ["model.path=Qwen/Qwen-VL-Chat"])).recipe
    assert find_subject(chat, "recipe").settled(chat).adapter.train_embeddings is False
    assert find_subject(load_recipe(tmp_path / "recipe.yaml"), "full").parameters() == 9_656_935_168


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--lengths", "12"], "an image and some text are at least"),
        (["--lengths", "512,long"], "neither a number of tokens nor mix"),
        (["--steps", "0"], "must be a whole number from 1"),
        (["--both", "adapter=null", "freeze.language=false"], "adapter: null"),
        (["data.max_length=200"], "data.max_length 200 has no room"),
        (["model.path=./nothing"], "./nothing: no such folder"),
    ],
)
def test_wrong_input_is_told_with_exit_code_2(tmp_path, capsys, arguments, told):
    recipe = write_recipe(tmp_path)
    assert main(["bench", str(recipe), *arguments, "--to", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out" / "bench.json").exists()


@pytest.mark.gpu
def test_on_the_gpu(tmp_path):
    """LoRA and Q-LoRA on CUDA: peaks are the allocator's."""
    asked = wanted(tmp_path, "model.dtype=bfloat16", both=True, lengths=("300", "mix"), steps=2)
    rows = bench(asked, tmp_path / "out", say=say_nothing)
    assert len(rows) == 8 and all(len(row.seconds) == 2 and not row.note for row in rows)
    assert all(0 < row.peak <= row.reserved for row in rows)
    assert all(row.useful_share < row.executed_share for row in rows)
    assert all((row.plan is None) == (row.settings == "published") for row in rows)
