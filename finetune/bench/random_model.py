"""A model of any size with random weights, made directly on its device. Values affect neither time nor memory.

4-bit weights are made and quantised one linear at a time, so the peak is the finished model and one linear in 16 bits;
the 19.3 GB of the published 16-bit model are never allocated.
"""

import copy
from collections.abc import Collection
from math import isqrt

import torch
from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer

from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration
from qwenvl.model.host_embedding import keep_embeddings_on_cpu
from qwenvl.model.language import RMSNorm
from qwenvl.model.nf4_weights import compute_in, is_quantized, quantize
from qwenvl.model.quantization import nf4_config, require_bitsandbytes
from qwenvl.model.resampler import Resampler, sine_cosine_grid

SPREAD = 0.02
"""Standard deviation of all weights except norms: the published `initializer_range`."""


def make_random_model(
    config: QwenVLConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    parts: Collection[str] = (),
    embeddings_on_cpu: bool = False,
    seed: int = 0,
) -> QwenVLForConditionalGeneration:
    """Make a model as `load_model` returns it, in eval mode, with random weights.

    Args:
        config: its sizes; not changed.
        device: where the model is made.
        dtype: of all weights that are not in 4 bits, and of computation.
        parts: in NF4 (see `quantization.PARTS`); none for a 16- or 32-bit model.
        embeddings_on_cpu: keep the token embeddings in host memory.

    Raises:
        InputError: `parts` without bitsandbytes.
    """
    if parts:
        require_bitsandbytes()
    config = copy.deepcopy(config)
    config.dtype = dtype
    device = torch.device(device)
    with torch.device("meta"):
        model = QwenVLForConditionalGeneration(config)
    quantizer = None
    if parts:
        quantizer = AutoHfQuantizer.from_config(nf4_config(parts, dtype), pre_quantized=False)
        quantizer.preprocess_model(model, dtype=dtype, device_map={"": device})
    here = torch.Generator(device).manual_seed(seed)
    in_host_memory = torch.Generator().manual_seed(seed)
    for module in model.modules():
        _fill(module, dtype, in_host_memory if embeddings_on_cpu and module is model.transformer.wte else here)
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
        compute_in(model, dtype)
    if embeddings_on_cpu:
        keep_embeddings_on_cpu(model)
    return model.eval()


def _fill(module: nn.Module, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Give the module's own parameters and buffers, not those of its children, values on the generator's device."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        values = torch.empty(parameter.shape, dtype=dtype, device=generator.device)
        if name == "weight" and isinstance(module, nn.LayerNorm | RMSNorm):
            values.fill_(1)
        elif name.endswith("bias"):
            values.zero_()
        else:
            values.normal_(std=SPREAD, generator=generator)
        if name == "weight" and is_quantized(module):
            _put_in_4bit(module, values)
        else:
            setattr(module, name, nn.Parameter(values))
    if isinstance(module, Resampler):
        queries, output_dim = module.query.shape
        module.pos_embed = sine_cosine_grid(isqrt(queries), output_dim).to(generator.device)


def _put_in_4bit(linear: nn.Module, values: torch.Tensor) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    assert isinstance(linear, Linear4bit), "no other module has a 4-bit weight"
    codes, state = quantize(values)
    linear.weight = Params4bit(codes, quant_state=state, quant_type="nf4", module=linear, bnb_quantized=True)
    linear.quant_state = state
