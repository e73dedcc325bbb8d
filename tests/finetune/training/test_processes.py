"""A run's process group is closed at its end, and only then."""

import pytest
import torch
import torch.distributed as dist
from forked_ranks import finetune_on

from finetune.errors import Failed, Interrupted
from finetune.training.processes import closing_process_group, stop_together


@pytest.fixture
def open_group():
    opened = False

    def open_it():
        nonlocal opened
        opened = True
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    yield open_it
    if opened and dist.is_initialized():
        dist.destroy_process_group()


def test_closed_when_all_is_done(open_group):
    with closing_process_group():
        open_group()
    assert not dist.is_initialized()


def test_closed_when_stopped_with_the_state_saved(open_group):
    with pytest.raises(Interrupted), closing_process_group():
        open_group()
        raise Interrupted(15, saved=True)
    assert not dist.is_initialized()


@pytest.mark.parametrize("error", [Failed("a disk is full"), Interrupted(15, saved=False)])
def test_left_to_the_launcher_when_something_failed(open_group, error):
    with pytest.raises(type(error)), closing_process_group():
        open_group()
        raise error
    assert dist.is_initialized()


def test_the_callers_own_group_stays(open_group):
    open_group()
    with closing_process_group():
        pass
    assert dist.is_initialized()


def test_all_stop_where_one_has_failed(open_group, monkeypatch):
    open_group()
    device = torch.device("cpu")
    stop_together(None, device)
    with pytest.raises(Failed, match="the loss is nan"):
        stop_together(Failed("the loss is nan"), device)
    monkeypatch.setattr(dist, "all_reduce", lambda failed, op: failed.fill_(1))
    with pytest.raises(Failed, match="another process of this run failed"):
        stop_together(None, device)


REPEATED = """
import os
import sys
import torch
import torch.distributed as dist
from finetune.training.processes import closing_process_group

for number in range(25):
    with closing_process_group():
        store = dist.FileStore(f"{sys.argv[1]}/{number}", 2)
        dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=2)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
        dist.all_gather_object([None, None], {"left out": list(range(100))})
"""


def test_two_processes_end_after_a_last_collective(tmp_path):
    """The model outlives the group here, as the trainer does in a run. Without a reference to the group this hangs."""
    script = tmp_path / "repeated.py"
    script.write_text(REPEATED)
    done = finetune_on(2, tmp_path, program=script)
    assert [one.returncode for one in done] == [0, 0], done
