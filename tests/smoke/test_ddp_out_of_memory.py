"""Two processes of which one runs out of memory: both go on, and reach what they would have reached."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked_ranks import finetune_on
from recipes_for_tests import write_recipe, write_rows
from safetensors.torch import load_file

from finetune.recipe import load_recipe
from finetune.terminal import say_nothing
from finetune.training.processes import average_gradients
from finetune.training.train import train

MEMORY = Path(__file__).parents[1] / "helpers" / "memory_for_tests.py"
SETTINGS = {
    "adapter__dropout": 0.0,
    "data__shuffle": False,
    "data__tokens_per_batch": 2048,
    "train__optim": "sgd",
    "train__learning_rate": 0.1,
    "train__max_steps": 2,
    "train__save_strategy": "no",
    "train__per_device_train_batch_size": 4,
}


def in_small_memory(recipe: Path, tokens: int, where: str, rank: int) -> list[subprocess.CompletedProcess]:
    """Two processes; packs of more than so many tokens do not fit into the memory of one of them."""
    return finetune_on(2, tokens, where, rank, recipe, program=MEMORY)


def results(folder: Path):
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    described = json.loads((folder / "run" / "run.json").read_text())
    adapter = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    return adapter, [record["loss"] for record in records if "loss" in record], described


def assert_same(ours, theirs):
    assert ours[1] == pytest.approx(theirs[1], rel=1e-6)
    assert ours[0].keys() == theirs[0].keys()
    for name, tensor in theirs[0].items():
        assert (ours[0][name] - tensor).abs().max() <= 1e-6, name


def recipe_of(folder: Path, **changes) -> Path:
    """With 16 rows: a last batch that is not full would be filled up in another way on two processes than on one."""
    recipe = write_recipe(folder, **SETTINGS, **changes)
    write_rows(folder / "train.jsonl", 16)
    return recipe


# The batches of the second process have some 1,250 and 980 tokens in turn.
@pytest.mark.parametrize(
    ("tokens", "accumulation", "rank"),
    [
        # In a batch that is not the step's last.
        pytest.param(1100, 2, 1, marks=pytest.mark.slow),
        (650, 1, 1),  # in the step's only pack, after which gradients are exchanged
    ],
)
def test_one_process_runs_out_of_memory(tmp_path, tokens, accumulation, rank):
    one = recipe_of(tmp_path / "one", train__gradient_accumulation_steps=2 * accumulation)
    two = recipe_of(tmp_path / "two", train__gradient_accumulation_steps=accumulation)
    train(load_recipe(one), say_nothing)
    done = in_small_memory(two, tokens, "backward", rank)
    assert [one.returncode for one in done] == [0, 0], done
    ours = results(tmp_path / "two")
    assert_same(ours, results(tmp_path / "one"))
    # The main process tells of it, and writes it down for all.
    note = ours[2]["out_of_memory"][0]
    assert note["step"] == 1 and note["out_of_memory_tokens"] > tokens and note["tokens_per_batch"] < 1000
    assert [one.stdout.count("step 1/2 | out of memory with") for one in done] == [1, 0]


def test_a_process_that_cannot_go_on_ends_all(tmp_path):
    done = in_small_memory(recipe_of(tmp_path), 400, "forward", 1)
    assert all(one.returncode != 0 for one in done)
    assert "one conversation by itself is too much for the memory" in done[1].stderr


def test_a_batch_without_images_leaves_the_vision_side_without_gradients(tmp_path):
    """On one process of two; the other's count half."""
    settings = SETTINGS | {"freeze": {"resampler": False}, "train__per_device_train_batch_size": 1}
    one = write_recipe(tmp_path / "one", **settings, train__gradient_accumulation_steps=2)
    two = write_recipe(tmp_path / "two", **settings, train__gradient_accumulation_steps=1)
    train(load_recipe(one), say_nothing)
    done = finetune_on(2, two)
    assert [one.returncode for one in done] == [0, 0], done
    ours, theirs = (results(tmp_path / name) for name in ("two", "one"))
    assert any("attn_pool" in name for name in ours[0])
    assert_same(ours, theirs)


def test_gradients_that_no_process_has_stay_away(tmp_path):
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    parameters[0].grad = torch.tensor([1.0, 2.0, 3.0])
    parameters[2].grad = torch.tensor([4.0, 5.0, 6.0]).double().to(torch.float32)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        average_gradients(parameters)
    finally:
        dist.destroy_process_group()
    assert parameters[1].grad is None
    assert parameters[0].grad.tolist() == [1.0, 2.0, 3.0] and parameters[2].grad.tolist() == [4.0, 5.0, 6.0]
