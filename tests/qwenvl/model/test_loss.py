import pytest
import torch
from torch.nn.functional import cross_entropy

from qwenvl.model import loss as loss_module
from qwenvl.model.loss import next_token_loss, without_image_targets


@pytest.fixture(params=[3, 256])
def rows_at_a_time(request, monkeypatch):
    """Once with many pieces, once with one."""
    monkeypatch.setattr(loss_module, "ROWS_AT_A_TIME", request.param)


def example(dtype=torch.float32):
    torch.manual_seed(0)
    logits = torch.randn(3, 9, 31, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 31, (3, 9))
    labels[0, :6] = -100
    labels[2] = -100
    return logits, labels


def reference(logits, labels):
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def test_value_and_gradient(rows_at_a_time):
    logits, labels = example()
    ours = next_token_loss(logits, labels)
    (ours_gradient,) = torch.autograd.grad(ours, logits)
    theirs = reference(logits, labels)
    (their_gradient,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours_gradient, their_gradient)


def test_gradient_numerically(rows_at_a_time):
    logits, labels = example(torch.float64)
    assert torch.autograd.gradcheck(lambda x: next_token_loss(x, labels), (logits,))


def test_16_bit_logits_are_widened_before_the_exponential():
    logits, labels = example(torch.bfloat16)
    ours = next_token_loss(logits, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, reference(logits, labels))
    (gradient,) = torch.autograd.grad(ours, logits)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_items_divides_the_sum(as_tensor):
    logits, labels = example()
    count = (labels[:, 1:] != -100).sum().item()
    whole_step = torch.tensor(count * 4) if as_tensor else count * 4
    torch.testing.assert_close(next_token_loss(logits, labels, whole_step) * 4, next_token_loss(logits, labels))


def test_nothing_supervised():
    logits, labels = example()
    labels[:] = -100
    assert next_token_loss(logits, labels).isnan()
    loss = next_token_loss(logits, labels, num_items_in_batch=5)
    assert loss == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_the_first_label_is_never_predicted():
    logits, labels = example()
    before = next_token_loss(logits, labels)
    labels[1, 0] = 30 - labels[1, 0]
    assert next_token_loss(logits, labels) == before


IMGPAD = 30


def test_image_placeholders_are_ignored():
    labels = torch.tensor([[1, IMGPAD, IMGPAD, IMGPAD, 2, 3, -100, 4]])
    assert without_image_targets(labels, IMGPAD).tolist() == [[1, -100, -100, -100, 2, 3, -100, 4]]
    assert without_image_targets(labels, None) is labels  # a text-only checkpoint
