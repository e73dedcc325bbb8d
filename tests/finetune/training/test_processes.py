"""A run's process group is closed at its end, and only then."""

import pytest
import torch.distributed as dist

from finetune.errors import Failed, Interrupted
from finetune.training.processes import closing_process_group


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
