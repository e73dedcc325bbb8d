"""Fused kernels against the plain modules. On the CPU with the functions of liger-kernel spelled out: what they are
given, and in which order; on a GPU with the kernels themselves."""

import sys
from types import ModuleType

import pytest
import torch

from qwenvl import InputError
from qwenvl.model import kernels
from qwenvl.model.kernels import kernels_in_use, liger_runs, use_kernels
from qwenvl.model.language import RMSNorm


def liger_norm(x, weight, eps, offset, casting, in_place):
    assert (offset, casting, in_place) == (0.0, "llama", False) and x.dtype == weight.dtype
    wide = x.float()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight


def liger_rope(query, key, cos, sin):
    assert query.ndim == 4 and cos.shape[1:] == sin.shape[1:] == (query.shape[2], query.shape[3])
    assert cos.shape[0] in (1, query.shape[0])

    def rotate(x):
        half = x.shape[-1] // 2  # the tables' second half is the first one's copy, and is not read
        c, s = cos[:, None, :, :half], sin[:, None, :, :half]
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(x.dtype)

    return rotate(query), rotate(key)


def liger_silu_mul(a, b):
    return torch.nn.functional.silu(a) * b


FUNCTIONS = {
    "rms_norm": ("LigerRMSNormFunction", liger_norm),
    "rope": ("LigerRopeFunction", liger_rope),
    "swiglu": ("LigerSiLUMulFunction", liger_silu_mul),
}


@pytest.fixture
def liger_spelled_out(monkeypatch):
    """Yields which functions were called."""
    called = set()
    for module, (name, function) in FUNCTIONS.items():

        class Function:
            @staticmethod
            def apply(*args, _function=function, _name=name):
                called.add(_name)
                return _function(*args)

        stand_in = ModuleType(f"liger_kernel.ops.{module}")
        setattr(stand_in, name, Function)
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    for package in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setattr(kernels, "require_liger", lambda: None)
    return called


@pytest.fixture
def batch(expected):
    ids = torch.cat([expected["one_image.input_ids"], expected["text_only.input_ids"]])[None]
    lengths = [len(expected["one_image.input_ids"]), len(expected["text_only.input_ids"])]
    return {"input_ids": ids, "labels": ids, "pixel_values": expected["pixel_values"][:1], "sequence_lengths": lengths}


def step(model, batch, which):
    use_kernels(model, which)
    assert kernels_in_use(model) == which
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_liger_gives_the_plain_numbers_and_goes_away_again(tiny_model, batch, liger_spelled_out):
    tiny_model.train()
    names, kinds = list(tiny_model.state_dict()), [type(module) for module in tiny_model.modules()]
    plain, expected_gradients = step(tiny_model, batch, "torch")
    assert not liger_spelled_out
    fused, gradients = step(tiny_model, batch, "liger")
    assert liger_spelled_out == {name for name, _ in FUNCTIONS.values()}
    assert list(tiny_model.state_dict()) == names
    assert (fused.logits - plain.logits).abs().max() < 1e-5
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, name
    use_kernels(tiny_model, "torch")
    assert [type(module) for module in tiny_model.modules()] == kinds


def test_long_context_in_eval(tiny_model, expected, liger_spelled_out):
    """Stretched rotary tables and log-n factors, and generation with a cache, as without."""
    long = expected["long.input_ids"][None]
    answers = []
    for which in kernels.KERNELS:
        use_kernels(tiny_model, which)
        with torch.no_grad():
            logits = tiny_model(long).logits
        answers.append((logits, tiny_model.generate(long, max_new_tokens=4, do_sample=False)))
    assert (answers[0][0] - answers[1][0]).abs().max() < 2e-5
    assert torch.equal(answers[0][1], answers[1][1])


def test_a_norm_in_another_type_stays_plain(liger_spelled_out):
    norm, x = RMSNorm(8, 1e-6), torch.randn(2, 3, 8).bfloat16()
    expected = norm(x)
    use_kernels(norm, "liger")
    assert torch.equal(norm(x), expected) and not liger_spelled_out


def test_what_cannot_be_is_refused(tiny_model, monkeypatch):
    with pytest.raises(InputError, match="torch, liger"):
        use_kernels(tiny_model, "triton")
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert not liger_runs()
    with pytest.raises(InputError, match="pip install liger-kernel"):
        use_kernels(tiny_model, "liger")
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="NVIDIA GPU"):
        use_kernels(tiny_model, "liger")
    assert kernels_in_use(tiny_model) == "torch"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_themselves(tiny_model, batch, dtype):
    """float32 to its rounding; bfloat16 as far from float32 as the plain modules are, give or take its rounding."""
    batch = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}
    tiny_model.cuda().train()
    exact, exact_gradients = step(tiny_model, batch, "torch")
    tiny_model.to(dtype)
    plain, plain_gradients = step(tiny_model, batch, "torch")
    fused, fused_gradients = step(tiny_model, batch, "liger")
    rounding = 1e-4 if dtype == torch.float32 else 2e-2
    assert (fused.logits.float() - exact.logits).norm() <= 2 * (plain.logits.float() - exact.logits).norm() + (
        rounding * exact.logits.norm()
    )
    for name, gradient in exact_gradients.items():
        far = (plain_gradients[name].float() - gradient).norm()
        assert (fused_gradients[name].float() - gradient).norm() <= 2 * far + rounding * gradient.norm(), name
