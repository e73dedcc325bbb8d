"""What a run computes with: `auto` settled, and what cannot run refused before weights are loaded."""

import shutil

import pytest
import torch
from recipes_for_tests import TINY
from safetensors.torch import save_file

from finetune.errors import UserError
from finetune.model import computing
from finetune.model.computing import ComputeBackends, choose_backends, computing_dtype
from finetune.recipe.sections import Model


def model(**keys) -> Model:
    return Model(path=str(TINY), **keys)


def test_auto_on_the_cpu():
    chosen = choose_backends(model())
    assert chosen == ComputeBackends("varlen", "torch")
    assert str(chosen) == "varlen attention (each sequence of a pack by itself), torch kernels"


def test_auto_takes_liger_where_it_runs(monkeypatch):
    monkeypatch.setattr(computing, "liger_runs", lambda: True)
    assert choose_backends(model()).kernels == "liger"
    assert choose_backends(model(kernels="torch")).kernels == "torch"


@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
def test_a_choice_stands(attention):
    assert choose_backends(model(attention=attention)).attention == attention


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kernels": "liger"}, "model.kernels: liger.*pip install liger-kernel"),
        ({"attention": "flash_attention_2"}, "model.attention: flash_attention_2.*flash-attn"),
    ],
)
def test_what_cannot_run_is_refused(monkeypatch, keys, message):
    monkeypatch.setattr("qwenvl.model.kernels.find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        choose_backends(model(**keys))


def test_auto_is_the_type_that_a_checkpoint_is_loaded_in(tmp_path):
    assert computing_dtype(model(dtype="bfloat16"), str(TINY), torch.float32) == torch.bfloat16
    assert computing_dtype(model(dtype="auto"), str(TINY), torch.float16) == torch.float16
    for kind in (torch.float32, torch.bfloat16):  # where the config says nothing
        folder = tmp_path / str(kind)
        shutil.copytree(TINY, folder)
        save_file({"lm_head.weight": torch.zeros(2, 2, dtype=kind)}, folder / "model.safetensors")
        assert computing_dtype(model(dtype="auto"), str(folder), None) == kind
