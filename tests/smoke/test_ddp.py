"""Two processes reach what one process with twice the accumulation reaches."""

import json
import os

import pytest
import torch
from forked_ranks import finetune_on
from recipes_for_tests import finetune, write_recipe
from safetensors.torch import load_file

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port")


def logged(run, key):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records if key in record]


def test_two_processes_equal_twice_the_accumulation(tmp_path):
    """The same samples a step, dropout off; only the first process writes and speaks."""
    evaluate = {"data": [{"path": str(tmp_path / "one" / "eval.jsonl"), "format": "messages", "limit": 3}]}
    settings = {"adapter__dropout": 0.0, "train__max_steps": 3, "data__shuffle": False, "train__save_strategy": "no"}
    settings |= {"evaluate": {**evaluate, "predictions": 1}, "train__per_device_eval_batch_size": 1}
    settings |= {"train__eval_strategy": "steps", "train__eval_steps": 3}
    one = write_recipe(tmp_path / "one", **settings)
    two = write_recipe(tmp_path / "two", **settings, train__gradient_accumulation_steps=2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finetune(one, env=environment)
    port = str(20000 + os.getpid() % 20000)
    done = finetune(two, env=environment, launcher=(*TORCHRUN, port))
    runs = tmp_path / "two" / "run", tmp_path / "one" / "run"
    ours, theirs = (logged(run, "loss") for run in runs)
    assert len(ours) == 3
    assert ours == pytest.approx(theirs, abs=1e-5)
    # Three samples on two processes: each is counted once.
    assert logged(runs[0], "eval_samples") == logged(runs[1], "eval_samples") == [3]
    assert logged(runs[0], "eval_loss") == pytest.approx(logged(runs[1], "eval_loss"), abs=1e-4)
    first, second = (
        load_file(tmp_path / name / "run" / "adapter" / "adapter_model.safetensors") for name in ("one", "two")
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-4), name
    assert done.stdout.count("report      ") == 1


ONE_OF_ONE = """
import sys
import torch.distributed as dist
from finetune.recipe import load_recipe
from finetune.training.train import train

open_group, opened = dist.init_process_group, []
dist.init_process_group = lambda *args, **kwargs: (opened.append(True), open_group(*args, **kwargs))
train(load_recipe(sys.argv[1]))
assert opened and not dist.is_initialized()
"""


def test_a_run_closes_the_process_group_that_it_opened(tmp_path):
    """Left open, gloo now and then ends a process by SIGABRT that has done all it should."""
    recipe = write_recipe(tmp_path, train__max_steps=1, train__save_strategy="no")
    program = tmp_path / "one_of_one.py"
    program.write_text(ONE_OF_ONE)
    (done,) = finetune_on(1, recipe, program=program, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stdout + done.stderr
