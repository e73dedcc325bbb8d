"""4-bit weights: NF4 with double quantisation, in the format of bitsandbytes.

A weight is split into blocks of 64 values. Each value becomes one of 16 levels between minus and plus the block's
largest magnitude (absmax), which is stored in 8 bits (Dettmers et al., 2023, QLoRA): about 4.13 bits per value.
"""

from math import ceil
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

BLOCK = 64
"""Values per block, which share one absmax."""

NESTED_BLOCK = 256
"""Absmax values, which are quantised to 8 bits themselves, per block."""

# Values quantised at a time, a multiple of BLOCK: bitsandbytes needs 16 bytes of working memory per value.
PIECE = 1 << 20


def is_quantized(module: nn.Module) -> "TypeGuard[Linear4bit]":
    """Whether a module is a linear layer with its weight in 4 bits. PEFT's wrapper around one is not."""
    return isinstance(module, nn.Linear) and type(module.weight).__name__ == "Params4bit"


def quant_state(linear: "Linear4bit") -> "QuantState":
    """What decodes a 4-bit weight: its shape, its blocks' absmax, and the dtype it is decoded to."""
    from bitsandbytes.nn import Params4bit

    assert isinstance(linear.weight, Params4bit), "is_quantized() says so"
    state: QuantState = linear.weight.quant_state
    return state


def quantize(weight: torch.Tensor) -> "tuple[torch.Tensor, QuantState]":
    """Quantise a weight, in pieces; codes and state are bit for bit those of `bitsandbytes.functional.quantize_4bit`.

    In one piece, on the CPU, the published head would need 10 GB of working memory.

    Args:
        weight: (out, in), float32, bfloat16 or float16.

    Returns:
        The codes (out * in / 2, 1), two per byte, and the state that decodes them.
    """
    from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise

    if weight.is_meta:
        return _quantized_shapes(weight)
    values = weight.reshape(-1)
    codes = torch.empty(ceil(len(values) / 2), 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(ceil(len(values) / BLOCK), device=weight.device)
    for start in range(0, len(values), PIECE):
        piece, state = quantize_4bit(values[start : start + PIECE], blocksize=BLOCK, quant_type="nf4")
        codes[start // 2 :][: len(piece)] = piece
        absmax[start // BLOCK :][: len(state.absmax)] = state.absmax
    offset = absmax.mean()
    nested_codes, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    whole = QuantState(
        absmax=nested_codes,
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
    """As `quantize`, for a weight on the meta device, where bitsandbytes would cache a code table without values."""
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
    """Quantise a 16- or 32-bit weight and dequantise it: the weight as training on it in 4 bits sees it.

    Args:
        weight: (out, in), as the checkpoint stores it.
        dtype: compute dtype of the training; the weight is cast to it before it is quantised, as loading does.

    Returns:
        (out, in), in `dtype`.
    """
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*quantize(weight.to(dtype)))


def linear_4bit(linear: nn.Linear) -> "Linear4bit":
    """The linear layer with its weight in 4 bits, on the same device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        quantized = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, quant_type="nf4")
    codes, state = quantize(linear.weight.data)
    quantized.weight = Params4bit(codes, quant_state=state, quant_type="nf4", module=quantized, bnb_quantized=True)
    quantized.quant_state = state
    quantized.bias = linear.bias
    return quantized


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a loaded 4-bit model compute in one dtype, forward and backward, and keep its weights as they are packed.

    A 4-bit folder stores the dtype that it was quantised from. Transformers leaves the other weights in that dtype,
    and bitsandbytes would dequantise to it in backward, whatever the compute dtype is.

    On CPUs with AVX512-BF16 bitsandbytes would repack a weight permanently in the first forward in eval mode: logits
    change, and training that continues afterwards has wrong gradients, or crashes.
    """
    quantized = [module for module in model.modules() if is_quantized(module)]
    for linear in quantized:
        linear.support_avx512bf16_for_cpu = False
        linear.compute_dtype, linear.compute_type_is_set = dtype, True
        quant_state(linear).dtype = dtype
    codes = {id(linear.weight) for linear in quantized}
    for parameter in model.parameters():
        if id(parameter) not in codes:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.config.quantization_config.bnb_4bit_compute_dtype = dtype
