"""4-bit weights: the same bits as bitsandbytes makes, in little memory, and what training sees of them."""

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit

from qwenvl.model import nf4_weights
from qwenvl.model.nf4_weights import dequantized, is_quantized, linear_4bit, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


# The last piece is shorter; the last block is, too; less than a piece.
@pytest.mark.parametrize("shape", [(256, 192), (63, 310), (8, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_make_the_same_bits(monkeypatch, dtype, shape):
    monkeypatch.setattr(nf4_weights, "PIECE", 1024)
    values = weight(*shape).to(dtype)
    codes, state = quantize(values)
    expected_codes, expected = bnb.quantize_4bit(values, compress_statistics=True, quant_type="nf4")
    assert torch.equal(codes, expected_codes)
    ours, theirs = state.as_dict(packed=True), expected.as_dict(packed=True)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(dequantized(values, dtype), bnb.dequantize_4bit(expected_codes, expected))


def test_no_piece_is_larger_than_said(monkeypatch):
    sizes = []
    original = bnb.quantize_4bit
    monkeypatch.setattr(nf4_weights, "PIECE", 4096)
    monkeypatch.setattr(
        bnb, "quantize_4bit", lambda values, **how: sizes.append(len(values)) or original(values, **how)
    )
    quantize(weight(100, 192))
    assert sum(sizes) == 19200 and max(sizes) == 4096


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_sees_the_dequantized_weight(dtype):
    """Output and input gradient of the 4-bit linear are those of a plain one with the dequantised weight."""
    plain = torch.nn.Linear(128, 96).to(dtype)
    ours = linear_4bit(plain)
    assert isinstance(ours, Linear4bit) and is_quantized(ours) and not is_quantized(plain)
    ours.compute_dtype, ours.compute_type_is_set = dtype, True
    seen = dequantized(plain.weight.data, dtype)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for forward in (ours, lambda x: torch.nn.functional.linear(x, seen, plain.bias)):
        given = x.clone().requires_grad_()
        output = forward(given)
        output.float().square().sum().backward()
        results.append((output, given.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_the_weight_is_rounded_before_it_is_quantized():
    values = weight(64, 64)
    rounded = dequantized(values, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, dequantized(values.bfloat16(), torch.bfloat16))
    # NF4's error on normally distributed weights is 9.1% of their size.
    error = (dequantized(values, torch.float32) - values).norm() / values.norm()
    assert 0.08 < error < 0.10
