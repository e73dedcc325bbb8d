"""The evaluation's loss of a model that is sharded over processes is that of one process, and none waits for ever."""

import json

import pytest
import torch
from forked_ranks import on_ranks
from recipes_for_tests import TINY
from sharded_tiny import eval_batches, loss_sharded, sums_of, tiny_model

from finetune.memory.out_of_memory import PackBudget
from finetune.training.evaluation_loss import sum_losses
from qwenvl import load_processor


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_with_fewer_batches_take_part(tmp_path, processes):
    on_ranks(processes, loss_sharded, str(tmp_path))
    expected = sums_of(tiny_model(), eval_batches(load_processor(TINY), 7, 2), sharded=False)
    sums = [json.loads((tmp_path / f"sums-{rank}.json").read_text()) for rank in range(processes)]
    assert torch.tensor(sums).sum(0).tolist() == pytest.approx(expected, abs=1e-3)
    assert expected[2] == 7 and expected[3] > 0
    assert sums[1][2] == 1  # one sample: its other packs were empty
    raised = [(tmp_path / f"raised-{rank}").read_text() for rank in range(processes)]
    assert raised == ["row 7 is damaged" if rank == 1 else "process 1: row 7 is damaged" for rank in range(processes)]


@pytest.mark.parametrize("packs", [0, 1, 3])
def test_nothing_is_run_any_more_once_it_is_abandoned(packs):
    """In the middle of a batch too: its result will be thrown away."""
    batches, ran = eval_batches(load_processor(TINY), 6, 3), []

    def loss_of_pack(pack):
        ran.append(pack)
        return torch.tensor(1.0)

    sum_losses(
        batches,
        loss_of_pack,
        PackBudget("tokens", 1, ()),
        lambda pack, failure: None,
        seq_length=100,
        device=torch.device("cpu"),
        fillers=None,
        is_abandoned=lambda: len(ran) >= packs,
    )
    assert len(ran) == packs
