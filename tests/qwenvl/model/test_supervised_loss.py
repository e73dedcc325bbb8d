"""The loss at supervised positions alone: the numbers of the loss over logits, without the logits."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwenvl import InputError
from qwenvl.model.loss import SummedCrossEntropy, in_type_of, supervised_loss
from qwenvl.model.nf4_weights import linear_4bit
from qwenvl.text.chat import IGNORED

ROWS, WIDTH, VOCABULARY = 40, 64, 96


class WithHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.other = nn.Linear(1, 1)


def head_of(kind: str, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(1)
    head = WithHead().lm_head.to(dtype).requires_grad_(kind == "trained")
    if "4 bits" in kind:
        head = linear_4bit(head)
        head.compute_dtype, head.compute_type_is_set = dtype, True
    if "adapter" in kind or kind == "saved beside":
        inside = WithHead()
        inside.lm_head = head
        where = {"target_modules": ["other"], "modules_to_save": ["lm_head"]}
        if "adapter" in kind:
            where = {"target_modules": ["lm_head"]}
        head = get_peft_model(inside, LoraConfig(r=4, init_lora_weights=False, **where)).base_model.model.lm_head
        if kind == "saved beside":
            assert isinstance(head, ModulesToSaveWrapper)
            head.modules_to_save.float()
    return head


HEADS = ["frozen", "trained", "saved beside", "in 4 bits", "adapter", "adapter, in 4 bits"]


def example(dtype=torch.float32, rows=ROWS):
    torch.manual_seed(0)
    return torch.randn(rows, WIDTH, dtype=dtype, requires_grad=True), torch.randint(0, VOCABULARY, (rows,))


def over_logits(hidden, head, targets):
    logits = head(in_type_of(head, hidden))
    return SummedCrossEntropy.apply(logits, torch.arange(len(logits)), targets)


def gradients(loss, hidden, head, factor=0.37):
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss * factor, [hidden, *trained])


def assert_equal(ours, reference, tolerance):
    assert len(ours) == len(reference)
    for one, other in zip(ours, reference, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [7, 256])
def test_loss_and_gradients(kind, chunk):
    (hidden, targets), head = example(), head_of(kind)
    reference = over_logits(hidden, head, targets)
    loss = supervised_loss(hidden, head, targets, chunk=chunk)
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0)
    expected = gradients(reference, hidden, head)
    assert len(expected) == {"trained": 2, "saved beside": 2, "adapter": 3, "adapter, in 4 bits": 3}.get(kind, 1)
    assert_equal(gradients(loss, hidden, head), expected, tolerance=1e-6)


@pytest.mark.parametrize("kind", HEADS)
def test_16_bits(kind):
    """As near to float32 as the loss over logits; a matrix trained in 16 bits sums its pieces in float32."""
    (hidden, targets), head = example(torch.bfloat16), head_of(kind, torch.bfloat16)
    wide, wide_head = hidden.detach().float().requires_grad_(), head_of(kind)
    exact = over_logits(wide, wide_head, targets)
    loss = supervised_loss(hidden, head, targets, chunk=7)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    ours = gradients(loss, hidden, head)
    theirs = gradients(over_logits(hidden, head, targets), hidden, head)
    for one, other, right in zip(ours, theirs, gradients(exact, wide, wide_head), strict=True):
        assert one.dtype == other.dtype
        assert (one - right).norm() <= 1.1 * (other - right).norm() + 2e-3 * right.norm()


def test_gradient_numerically():
    (hidden, targets), head = example(torch.float64, rows=5), head_of("trained", torch.float64)

    def loss(hidden, weight):
        head_with = nn.Linear(WIDTH, VOCABULARY, bias=False)
        head_with.weight = weight
        return supervised_loss(hidden, head_with, targets, chunk=2)

    weight = nn.Parameter(head.weight[:, :].detach().clone())
    # `gradcheck` goes backward through one loss several times, which this one refuses.
    (analytic,) = torch.autograd.grad(loss(hidden, weight), hidden)
    step = 1e-6 * torch.randn_like(hidden)
    with torch.no_grad():
        numeric = (loss(hidden + step, weight) - loss(hidden - step, weight)) / 2
    torch.testing.assert_close((analytic * step).sum(), numeric, rtol=1e-6, atol=0)


class LargestTensor(TorchDispatchMode):
    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.values = max([self.values, *made])
        return result


@pytest.mark.parametrize("kind", HEADS)
def test_no_more_logits_than_a_chunk_has(kind):
    (hidden, targets), head = example(rows=900), head_of(kind)
    with LargestTensor() as largest:
        supervised_loss(hidden, head, targets, chunk=100).backward()
    # The hidden states' own gradient is what is largest.
    assert largest.values == max(900 * WIDTH, 100 * VOCABULARY) < 900 * VOCABULARY
    with LargestTensor() as largest:
        over_logits(hidden, head, targets).backward()
    assert largest.values == 900 * VOCABULARY


@pytest.mark.parametrize("kind", HEADS)
def test_without_rows(kind):
    (hidden, targets), head = example(rows=0), head_of(kind)
    loss = supervised_loss(hidden, head, targets)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, hidden, head))


def test_evaluation_makes_no_gradients():
    (hidden, targets), head = example(rows=900), head_of("trained")
    with torch.no_grad(), LargestTensor() as largest:
        loss = supervised_loss(hidden, head, targets, chunk=100)
    torch.testing.assert_close(loss, over_logits(hidden, head, targets).detach(), rtol=1e-6, atol=0)
    assert not loss.requires_grad
    assert largest.values == 100 * VOCABULARY < 900 * WIDTH


def test_backward_twice_is_refused():
    (hidden, targets), head = example(), head_of("frozen")
    loss = supervised_loss(hidden, head, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_autocast_does_not_reach_the_head():
    (hidden, targets), head = example(), head_of("trained")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = supervised_loss(hidden, head, targets)
    torch.testing.assert_close(loss, over_logits(hidden, head, targets), rtol=1e-6, atol=0)


# Through the model


@pytest.fixture
def batch(expected):
    return {
        "input_ids": expected["sft.input_ids"],
        "attention_mask": expected["sft.attention_mask"],
        "labels": expected["sft.labels_assistant"],
        "pixel_values": expected["pixel_values"][[0, 2, 4]],
    }


def step(model, batch, **how):
    model.zero_grad()
    output = model(**batch, **how)
    output.loss.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return output, found


def assert_same_step(model, batch, wrapped=None, **how):
    reference, expected = step(model, batch, **how)
    output, found = step(wrapped or model, batch, skip_logits=True, **how)
    assert output.logits is None
    torch.testing.assert_close(output.loss, reference.loss, rtol=1e-6, atol=0)
    assert len(found) == len(expected) > 0
    for (name, ours), theirs in zip(found.items(), expected.values(), strict=True):
        # Weights reached by the loss of both ways, in other orders of summing up.
        assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max() + 1e-9, name


@pytest.mark.parametrize("num_items_in_batch", [None, 90])
def test_skip_logits(tiny_model, batch, num_items_in_batch):
    assert_same_step(tiny_model.train(), batch, num_items_in_batch=num_items_in_batch)


def test_skip_logits_through_an_adapter(tiny_model, batch):
    config = LoraConfig(
        r=4,
        target_modules=["c_attn"],
        modules_to_save=["wte", "lm_head"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    assert_same_step(get_peft_model(tiny_model, config).train(), batch)


def test_skip_logits_through_ddp(tiny_model, batch):
    """Its hooks see every gradient: with one process, and a hook that halves what is exchanged, all are halves."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(copy.deepcopy(tiny_model).train())
        wrapped.register_comm_hook(None, halve)
        _, exchanged = step(wrapped, batch, skip_logits=True)
    finally:
        torch.distributed.destroy_process_group()
    _, expected = step(tiny_model.train(), batch, skip_logits=True)
    assert {name.removeprefix("module.") for name in exchanged} == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(exchanged[f"module.{name}"], gradient / 2, rtol=1e-5, atol=1e-8)


def halve(state, bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer() / 2)
    return future


def test_nothing_supervised(tiny_model, batch):
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    output, found = step(tiny_model.train(), batch, skip_logits=True, num_items_in_batch=5)
    assert output.loss == 0
    assert all((gradient == 0).all() for gradient in found.values())


@pytest.mark.parametrize("wrong", [{"labels": None}, {"logits_to_keep": 3}, {"logits_to_keep": torch.tensor([3])}])
def test_contradictions(tiny_model, batch, wrong):
    with pytest.raises(InputError, match="needs labels, and no logits_to_keep"):
        tiny_model(**(batch | wrong), skip_logits=True)
