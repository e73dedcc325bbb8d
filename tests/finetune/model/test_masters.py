"""Float32 masters, rounded where they are computed with."""

import pytest
import torch
from plans_for_tests import EVERYTHING_IN_FULL, THREE, real_batch, real_model, recipe_of

from finetune.model.masters import copy_bytes, rounded_masters
from finetune.model.recomputation import set_recomputation
from finetune.model.step_loss import forward_with_loss
from qwenvl import load_model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return real_model(recipe_of("model.dtype=bfloat16", *EVERYTHING_IN_FULL)).train()


def backward(model, batch, dtype):
    with rounded_masters(model, dtype):
        forward_with_loss(model, model, batch, items=10).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
def test_forward_and_backward_are_those_of_the_16_bit_model(model, recomputation):
    batch = real_batch(THREE)
    set_recomputation(model, recomputation)
    ours = backward(model, batch, torch.bfloat16)
    plain = load_model(model.name_or_path, dtype=torch.bfloat16).train()
    plain.set_attn_implementation(model.config._attn_implementation)
    set_recomputation(plain, recomputation)
    theirs = backward(plain, batch, None)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.dtype == torch.bfloat16
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name], gradient.float()), name


def test_gradients_of_several_packs_are_summed_in_float32(model):
    batches = [real_batch(THREE) for _ in range(3)]
    alone = []
    for batch in batches:
        alone.append(backward(model, batch, torch.bfloat16))
        model.zero_grad()
    for batch in batches:
        together = backward(model, batch, torch.bfloat16)
    for name, gradient in together.items():
        assert torch.equal(gradient, alone[0][name] + alone[1][name] + alone[2][name]), name


def test_the_masters_are_back_after_an_error(model):
    before = {name: (id(parameter), parameter.dtype) for name, parameter in model.named_parameters()}
    copies = copy_bytes(model, torch.bfloat16)
    with pytest.raises(MemoryError), rounded_masters(model, torch.bfloat16):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert sum(one.nbytes for one in model.parameters()) == copies
        raise MemoryError
    assert {name: (id(parameter), parameter.dtype) for name, parameter in model.named_parameters()} == before


def test_frozen_weights_and_adapters_are_as_they_were():
    frozen = real_model(recipe_of("model.dtype=bfloat16", "adapter=null", "freeze.language=false"))
    types = {name: one.dtype for name, one in frozen.named_parameters()}
    assert {kind for name, kind in types.items() if ".visual." in name} == {torch.bfloat16}
    assert {kind for name, kind in types.items() if ".visual." not in name} == {torch.float32}
