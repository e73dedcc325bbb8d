"""A head in 4 bits piece by piece: the numbers of the whole one, and no piece larger than it should be."""

import pytest
import torch
from torch import nn

from qwenvl import load_model
from qwenvl.model import quantized_head
from qwenvl.model.loss import supervised_loss
from qwenvl.model.nf4_weights import linear_4bit
from qwenvl.model.quantized_head import FEW_ROWS, head_logits
from tests.qwenvl.model.test_supervised_loss import LargestTensor

WIDTH, VOCABULARY, PIECE = 128, 1000, 384  # three blocks of absmax values; the last piece is shorter


@pytest.fixture
def head(monkeypatch):
    """A head of three pieces, each of whole blocks of magnitudes."""
    monkeypatch.setattr(quantized_head, "TOKENS_AT_A_TIME", PIECE)
    torch.manual_seed(0)
    made = linear_4bit(nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False))
    made.compute_dtype, made.compute_type_is_set = torch.float32, True
    return made


def rows(count: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(count, WIDTH, requires_grad=True)


@pytest.mark.parametrize("shape", [(FEW_ROWS, WIDTH), (30, WIDTH), (2, 15, WIDTH), (0, WIDTH)])
def test_logits_and_their_gradient(head, shape):
    hidden = rows(torch.Size(shape[:-1]).numel())
    ours, theirs = head_logits(head, hidden.view(shape)), head(hidden.view(shape))
    assert ours.shape == (*shape[:-1], VOCABULARY) and ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    factors = torch.randn_like(ours)
    (one,), (other,) = (torch.autograd.grad((logits * factors).sum(), hidden) for logits in (ours, theirs))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [7, 64])
def test_loss_and_its_gradient(head, chunk):
    """Targets at the ends of the pieces and of the vocabulary among them."""
    hidden = rows(40)
    targets = torch.randint(0, VOCABULARY, (40,))
    targets[:6] = torch.tensor([0, PIECE - 1, PIECE, 2 * PIECE - 1, 2 * PIECE, VOCABULARY - 1])
    ours = supervised_loss(hidden, head, targets, chunk=chunk)
    theirs = nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    (one,), (other,) = (torch.autograd.grad(loss * 0.37, hidden) for loss in (ours, theirs))
    assert (one - other).abs().max() <= 5e-6 * other.abs().max()
    with pytest.raises(RuntimeError, match="a second time"):
        ours.backward()


def test_no_rows(head):
    hidden = rows(0)
    loss = supervised_loss(hidden, head, torch.empty(0, dtype=torch.long))
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, WIDTH)


@pytest.mark.parametrize("what", ["logits", "loss"])
def test_the_matrix_is_never_there_whole(head, what):
    hidden = rows(30)
    with LargestTensor() as largest:
        if what == "logits":
            head_logits(head, hidden).sum().backward()
        else:
            supervised_loss(hidden, head, torch.zeros(30, dtype=torch.long)).backward()
    codes = WIDTH * VOCABULARY // 2
    assert largest.values <= max(codes, WIDTH * PIECE) < WIDTH * VOCABULARY


def test_a_model_with_such_a_head(tiny_folder, monkeypatch):
    """768 tokens of the vocabulary in three pieces."""
    ids = torch.arange(1, 60)[None]
    model = load_model(tiny_folder, quantization="nf4", quantize=["language", "head"], dtype="float32")

    def numbers():
        with torch.no_grad():
            return model(input_ids=ids).logits, model(input_ids=ids, labels=ids, skip_logits=True).loss

    whole = numbers()
    monkeypatch.setattr(quantized_head, "TOKENS_AT_A_TIME", 256)
    for ours, theirs in zip(numbers(), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
