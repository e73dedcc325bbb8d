"""4-bit weights (NF4 with double quantisation, by bitsandbytes): how they are made, and what training sees.

A weight is cut into blocks of 64 values; each value becomes one of 16 levels between minus and plus the block's
largest magnitude, and those magnitudes are held in 8 bits (Dettmers et al., 2023, QLoRA). About 4.13 bits a value.
"""

from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

BLOCK = 64
"""Values that share a largest magnitude."""

NESTED_BLOCK = 256
"""Magnitudes, themselves in 8 bits, that share one."""

# Of a weight that is quantised in host memory: a multiple of BLOCK. bitsandbytes needs 16 bytes a value meanwhile.
PIECE = 1 << 20


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a linear whose weight is in 4 bits. PEFT's wrapper around one is not."""
    return isinstance(module, nn.Linear) and type(module.weight).__name__ == "Params4bit"


def quantize(weight: torch.Tensor) -> "tuple[torch.Tensor, QuantState]":
    """The codes and the state that `bitsandbytes.functional.quantize_4bit` gives, bit by bit, made piece by piece.

    At once, on the CPU, the published head would take 10 GB meanwhile.

    Args:
        weight: (out, in), float32, bfloat16 or float16.

    Returns:
        Codes (out * in / 2, 1), two a byte; the state has the blocks' magnitudes.
    """
    from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise

    if weight.is_meta:
        return _quantized_shapes(weight)
    values = weight.reshape(-1)
    codes = torch.empty(ceil(len(values) / 2), 1, dtype=torch.uint8, device=weight.device)
    magnitudes = torch.empty(ceil(len(values) / BLOCK), device=weight.device)
    for start in range(0, len(values), PIECE):
        made, state = quantize_4bit(values[start : start + PIECE], blocksize=BLOCK, quant_type="nf4")
        codes[start // 2 :][: len(made)] = made
        magnitudes[start // BLOCK :][: len(state.absmax)] = state.absmax
    offset = magnitudes.mean()
    absmax, nested = quantize_blockwise(magnitudes - offset, blocksize=NESTED_BLOCK)
    whole = QuantState(
        absmax=absmax,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=state.code,
        quant_type="nf4",
        offset=offset,
        state2=nested,
    )
    return codes, whole


def _quantized_shapes(weight: torch.Tensor) -> "tuple[torch.Tensor, QuantState]":
    """As `quantize`, of a weight without values: bitsandbytes would keep a table without them for all that follow."""
    from bitsandbytes.functional import QuantState

    def table(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    blocks = ceil(weight.numel() / BLOCK)
    nested = QuantState(absmax=table(ceil(blocks / NESTED_BLOCK)), blocksize=NESTED_BLOCK, code=table(256))
    nested.dtype = torch.float32
    whole = QuantState(
        absmax=table(blocks, dtype=torch.uint8),
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=table(16),
        quant_type="nf4",
        offset=table(),
        state2=nested,
    )
    return table(ceil(weight.numel() / 2), 1, dtype=torch.uint8), whole


def dequantized(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A 16- or 32-bit weight as training on it in 4 bits sees it.

    Args:
        weight: (out, in), as the checkpoint stores it.
        dtype: what the training computed in; the weight is rounded to it before it is quantised, as loading does.

    Returns:
        (out, in), in `dtype`.
    """
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*quantize(weight.to(dtype)))


def linear_4bit(linear: nn.Linear) -> "Linear4bit":
    """A linear with its weight in 4 bits, on the same device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        made = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, quant_type="nf4")
    codes, state = quantize(linear.weight.data)
    made.weight = Params4bit(codes, quant_state=state, quant_type="nf4", module=made, bnb_quantized=True)
    made.quant_state = state
    made.bias = linear.bias
    return made


def compute_in(model: nn.Module, dtype: torch.dtype):
    """Make a loaded 4-bit model compute in one type throughout, forward and backward, and repack nothing.

    A stored folder brings the type it was made in: Transformers leaves its weights in that, and bitsandbytes would
    compute in it, and go through it on the way back only.

    On CPUs with AVX512-BF16 bitsandbytes repacks a weight for good in the first forward in eval mode: logits move, and
    training that goes on afterwards has wrong gradients, or crashes.
    """
    quantized = [module for module in model.modules() if is_quantized(module)]
    for linear in quantized:
        linear.support_avx512bf16_for_cpu = False
        linear.compute_dtype, linear.compute_type_is_set = dtype, True
        linear.weight.quant_state.dtype = dtype
    codes = {id(linear.weight) for linear in quantized}
    for parameter in model.parameters():
        if id(parameter) not in codes:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.config.quantization_config.bnb_4bit_compute_dtype = dtype
