"""Layers that compute anew: the gradients of those that keep everything, with packs attended sequence by sequence."""

import pytest
import torch
from varlen_kernel_on_cpu import kernel_on_cpu

from finetune.model.recomputation import set_recomputation
from qwenvl.model.varlen_attention import VARLEN


@pytest.fixture
def step(tiny_model, expected):
    rows = [expected[f"{name}.input_ids"] for name in ("one_image", "text_only", "two_images")]
    ids = torch.cat(rows)[None]
    tiny_model.set_attn_implementation(VARLEN)
    tiny_model.train()

    def compute(kind):
        set_recomputation(tiny_model, kind)
        tiny_model.zero_grad()
        output = tiny_model(
            ids,
            labels=ids,
            sequence_lengths=[len(row) for row in rows],
            pixel_values=expected["pixel_values"][[0, 1, 3]],
            skip_logits=True,
        )
        output.loss.backward()
        return {name: parameter.grad.clone() for name, parameter in tiny_model.named_parameters()}

    return compute


@pytest.mark.parametrize("kind", ["selective", "full", "offload"])
def test_gradients_are_equal(step, kind):
    kept, anew = step("none"), step(kind)
    assert all(torch.equal(anew[name], gradient) for name, gradient in kept.items())


@pytest.mark.parametrize(("kind", "times"), [("none", 1), ("selective", 1), ("full", 2), ("offload", 2)])
def test_how_often_the_kernel_attends(step, tiny_model, monkeypatch, kind, times):
    """Selective knows PyTorch's variable-length attention by its name."""
    with kernel_on_cpu(monkeypatch) as calls:
        anew = step(kind)
        assert len(calls) == times * tiny_model.config.num_hidden_layers
        kept = step("none")
    assert all(torch.equal(anew[name], gradient) for name, gradient in kept.items())
