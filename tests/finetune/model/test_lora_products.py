"""LoRA in the base's type: the same as PEFT's in float32, as exact as PEFT's in 16 bits, with fair dropout."""

import copy

import peft
import pytest
import torch
from torch import nn

from finetune.model import lora_products
from finetune.model.lora_products import (
    HalfLinear,
    left_to_peft,
    multiply_as_peft,
    multiply_in_16_bits,
)

LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["c_attn", "attn.c_proj", "w1", "w2"]}


def adapted(model, **changes):
    """The model with an adapter whose B is not zero, in float32."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA | changes))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    return model.train()


def step(model, ids):
    """Loss and gradients of a step."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach().double(), {
        name: parameter.grad.double() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.fixture
def ids():
    return torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def any_type(monkeypatch):
    monkeypatch.setattr(lora_products, "HALF", (torch.float32, torch.float64))


def relative(one, other):
    return ((one - other).norm() / other.norm().clamp(min=1e-30)).item()


def test_in_float32_it_is_what_peft_computes(tiny_model, ids, any_type):
    model = adapted(tiny_model)
    loss, gradients = step(model, ids)
    multiply_in_16_bits(model)
    own_loss, own = step(model, ids)
    assert abs(own_loss - loss) / loss < 1e-6
    assert own.keys() == gradients.keys() and len(own) > 8
    assert max(relative(own[name], gradients[name]) for name in own) < 1e-6
    multiply_as_peft(model)
    again, _ = step(model, ids)
    assert again == loss
    assert not any(isinstance(module, HalfLinear) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_as_exact_as_peft(tiny_model, dtype, monkeypatch):
    """Errors against the same step in float64, of eight batches together: PEFT's and its own are within 10 %."""
    batches = torch.randint(0, 200, (8, 2, 24), generator=torch.Generator().manual_seed(1))
    exact = adapted(copy.deepcopy(tiny_model.to(dtype)).double())
    model = adapted(tiny_model.to(dtype))
    for one, other in zip(exact.parameters(), model.parameters(), strict=True):
        one.data = other.data.double()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        true = [step(exact, ids) for ids in batches]
    of_peft = [step(model, ids) for ids in batches]
    multiply_in_16_bits(model)
    own = [step(model, ids) for ids in batches]

    def error(found, name):
        return sum(relative(one[name], other[name]) for (_, one), (_, other) in zip(found, true, strict=True))

    names = true[0][1]
    assert own[0][1].keys() == names.keys()
    assert all(
        gradient.dtype == torch.float32 for gradient in (p.grad for p in model.parameters()) if gradient is not None
    )
    for name in names:
        assert error(own, name) <= 1.1 * error(of_peft, name), name

    def loss_error(found):
        return sum(abs(one - other) / other for (one, _), (other, _) in zip(found, true, strict=True))

    assert loss_error(own) <= 1.1 * loss_error(of_peft)


def layer(rate, *, rank=8, width=64):
    """A LoRA layer in training whose update is all there is, in bfloat16."""
    base = nn.Linear(width, width, bias=False).to(torch.bfloat16)
    nn.init.zeros_(base.weight)
    model = peft.get_peft_model(
        nn.Sequential(base), peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=rate, target_modules=["0"])
    )
    adapter = model.base_model.model[0]
    for part in (adapter.lora_A, adapter.lora_B):
        part["default"].weight.data = torch.eye(*part["default"].weight.shape)
    multiply_in_16_bits(model)
    assert type(adapter) is HalfLinear
    return adapter.train()


def test_dropout_drops_its_share_and_keeps_the_mean():
    rate = 0.25
    x = torch.ones(4000, 64, dtype=torch.bfloat16)
    seen = layer(rate)(x)[:, :8].float()
    kept = seen != 0
    assert abs(kept.float().mean() - (1 - rate)) < 0.01  # 32,000 draws: four standard deviations
    assert seen[kept].unique().tolist() == pytest.approx([1 / (1 - rate)], rel=1e-2)
    # Independent from value to value, and from call to call.
    assert abs(torch.corrcoef(kept.float().T)[0, 1]) < 0.07
    again = layer(rate)(x)[:, :8] != 0
    assert abs((again == kept).float().mean() - (rate**2 + (1 - rate) ** 2)) < 0.02


def test_gradients_are_of_the_mask_that_was_applied():
    one = layer(0.5)
    x = torch.ones(32, 64, dtype=torch.bfloat16, requires_grad=True)
    y = one(x)
    y[:, :8].sum().backward()
    assert torch.equal(x.grad[:, :8] != 0, y[:, :8] != 0)
    assert x.grad[:, 8:].count_nonzero() == 0


def test_a_step_is_repeated_bit_for_bit_from_the_same_state(tiny_model, ids):
    model = adapted(tiny_model.to(torch.bfloat16), lora_dropout=0.3)
    multiply_in_16_bits(model)
    losses = []
    for recomputed in (False, False, True):
        if recomputed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(5)
        losses.append(step(model, ids))
    (loss, gradients), *others = losses
    for other_loss, other in others:
        assert other_loss == loss
        assert all(torch.equal(other[name], gradients[name]) for name in gradients)
    torch.manual_seed(6)
    assert step(model, ids)[0] != loss


def test_gate_and_value_share_a_mask(tiny_model):
    model = adapted(tiny_model.to(torch.bfloat16), lora_dropout=0.5)
    multiply_in_16_bits(model)
    mlp = model.get_base_model().transformer.h[0].mlp
    for linear in (mlp.w1, mlp.w2):
        nn.init.zeros_(linear.base_layer.weight)
        linear.lora_A["default"].weight.data = torch.eye(4, linear.in_features)
        linear.lora_B["default"].weight.data = torch.eye(linear.out_features, 4)
    gate, value = mlp.gate_and_value(torch.ones(1, 50, mlp.w1.in_features, dtype=torch.bfloat16))
    assert torch.equal(gate, value)
    assert 0 < (gate != 0).sum() < 200


def test_what_is_not_the_plain_kind_stays_with_peft(tiny_model, ids):
    model = adapted(tiny_model.to(torch.bfloat16), use_dora=True)
    before = step(model, ids)
    multiply_in_16_bits(model)
    assert len(left_to_peft(model)) == 4 * model.config.num_hidden_layers
    after = step(model, ids)
    assert before[0] == after[0]
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


def test_in_eval_mode_in_float32_and_switched_off_it_is_peft(tiny_model, ids):
    model = adapted(tiny_model.to(torch.bfloat16)).eval()
    off = peft.PeftModel.disable_adapter
    with torch.no_grad():
        on_before = model(input_ids=ids).logits
        with off(model):
            off_before = model(input_ids=ids).logits
        multiply_in_16_bits(model)
        assert torch.equal(model(input_ids=ids).logits, on_before)
        with off(model.train()):
            assert torch.equal(model(input_ids=ids).logits, off_before)
        merged = model.eval().merge_and_unload()
        assert relative(merged(input_ids=ids).logits.float(), on_before.float()) < 0.02
    wide = adapted(copy.deepcopy(merged).float(), lora_dropout=0.3)
    torch.manual_seed(2)
    before = step(wide, ids)
    multiply_in_16_bits(wide)
    torch.manual_seed(2)
    assert step(wide, ids)[0] == before[0]
