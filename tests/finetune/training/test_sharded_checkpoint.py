"""Weights and optimizer states in parts are read as they were written, or refused; here by one process."""

import pickle

import pytest
import torch
from torch import nn

from finetune.errors import UserError
from finetune.files.shards import INDEX, SHARDS, read_stored, stored_forms
from finetune.training.rng_states import own_random_state
from finetune.training.sharded_checkpoint import (
    is_sharded,
    load_sharded_optimizer,
    load_sharded_weights,
    save_shards,
)


def small(seed=0, width=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    model[2].bias.requires_grad_(False)  # no state of its own
    trained = [one for one in model.parameters() if one.requires_grad]
    groups = [{"params": trained[:1], "weight_decay": 0.1, "component": "first"}, {"params": trained[1:]}]
    return model, torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95))


def step(model, optimizer):
    model(torch.arange(20.0).reshape(5, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def stored(tmp_path):
    model, optimizer = small()
    for _ in range(3):
        step(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.004
    save_shards(tmp_path, model, optimizer, is_main=True)
    return tmp_path, model, optimizer


def test_what_is_read_goes_on_as_what_was_written(stored):
    folder, model, optimizer = stored
    assert is_sharded(folder)
    other, its_optimizer = small(seed=1)
    load_sharded_weights(folder, other)
    load_sharded_optimizer(folder, other, its_optimizer)
    assert [group["lr"] for group in its_optimizer.param_groups] == [0.004, 0.01]
    assert its_optimizer.param_groups[0]["betas"] == (0.8, 0.95)
    for _ in range(2):
        step(model, optimizer)
        step(other, its_optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_another_model_or_optimizer_is_refused(stored):
    folder, *_ = stored
    wider, _ = small(width=5)
    with pytest.raises(UserError, match=r"of another model: model\.0\.weight"):
        load_sharded_weights(folder, wider)
    model, _ = small()
    with pytest.raises(UserError, match="of another optimizer"):
        load_sharded_optimizer(folder, model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(UserError, match=r"model\.9\.weight is not there"):
        read_stored(folder, {"model.9.weight": torch.zeros(2)}, alone=True)


class Hostile:
    def __reduce__(self):
        return (print, ("this ran",))


def test_an_index_that_would_run_code_or_is_damaged_is_refused(stored, capsys):
    folder, *_ = stored
    index = folder / SHARDS / INDEX
    whole = index.read_bytes()
    for content in (pickle.dumps(Hostile()), whole[: len(whole) // 2], b"", pickle.dumps([1])):
        index.write_bytes(content)
        with pytest.raises(UserError, match="use another checkpoint"):
            stored_forms(folder)
    assert "this ran" not in capsys.readouterr().out


def test_a_process_without_a_random_state_of_its_own_takes_one_that_is_there(tmp_path):
    states = {}
    for process in range(2):
        torch.manual_seed(process)
        states[process] = {"cpu": torch.get_rng_state()}
        torch.save(states[process], tmp_path / f"rng_state_{process}.pth")
    for process, processes, source, name in [
        (0, 2, 0, "rng_state_0.pth"),
        (1, 2, 1, "rng_state_1.pth"),
        (2, 3, 0, "rng_state_2.pth"),
        (3, 4, 1, "rng_state_3.pth"),
        (0, 1, 0, "rng_state.pth"),
    ]:
        with own_random_state(tmp_path, process, processes) as folder:
            read = torch.load(folder / name, weights_only=True)
            assert torch.equal(read["cpu"], states[source]["cpu"])
            assert (folder == tmp_path) == (tmp_path / name).exists()
