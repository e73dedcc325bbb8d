"""Two processes reach what one process with twice the accumulation reaches."""

import json
import os

import pytest
import torch
from recipes_for_tests import finetune, write_recipe
from safetensors.torch import load_file

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port")


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_two_processes_equal_twice_the_accumulation(tmp_path):
    """The same samples a step, dropout off; only the first process writes and speaks."""
    settings = {"adapter__dropout": 0.0, "train__max_steps": 3, "data__shuffle": False, "train__save_strategy": "no"}
    one = write_recipe(tmp_path / "one", **settings)
    two = write_recipe(tmp_path / "two", **settings, train__gradient_accumulation_steps=2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finetune(one, env=environment)
    port = str(20000 + os.getpid() % 20000)
    done = finetune(two, env=environment, launcher=(*TORCHRUN, port))
    ours, theirs = losses(tmp_path / "two" / "run"), losses(tmp_path / "one" / "run")
    assert len(ours) == 3
    assert ours == pytest.approx(theirs, abs=1e-5)
    first, second = (
        load_file(tmp_path / name / "run" / "adapter" / "adapter_model.safetensors") for name in ("one", "two")
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-4), name
    assert done.stdout.count("report      ") == 1
