"""Which linear layers of a model are in 4 bits, as configurations, checkpoints and bitsandbytes name them."""

import importlib.util
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from qwenvl.checkpoint.gptq import is_gptq, read_settings
from qwenvl.checkpoint.settings import FLAG, Rule, check_keys, only
from qwenvl.errors import InputError
from qwenvl.model.configuration import QwenVLConfig
from qwenvl.model.layout import expected_tensors

PARTS = ("language", "vision", "head")
"""What may be held in 4 bits. The resampler, the embeddings, convolutions, norms and biases never are."""

DEFAULT_PARTS = ("language",)

# The prefix of the names of a part's linear layers, and the name of one of them.
_PREFIXES = {"language": "transformer.h.", "vision": "transformer.visual.transformer.", "head": "lm_head"}
_EXAMPLES = {
    "language": "transformer.h.0.mlp.w1",
    "vision": "transformer.visual.transformer.resblocks.0.mlp.c_fc",
    "head": "lm_head",
}

BITSANDBYTES = "bitsandbytes>=0.50"

_DTYPES = only("float32", "bfloat16", "float16")
_RULES: dict[str, Rule] = {
    "load_in_8bit": only(False),
    "quant_method": only("bitsandbytes"),
    "bnb_4bit_use_double_quant": FLAG,
    "bnb_4bit_compute_dtype": _DTYPES,
    "bnb_4bit_quant_storage": only("uint8"),
    **dict.fromkeys(("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"), FLAG),
    "llm_int8_skip_modules": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "a list of names",
    ),
}


def require_bitsandbytes() -> None:
    """Check that bitsandbytes is installed.

    Raises:
        InputError: it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"4-bit weights need bitsandbytes, which is not installed: pip install '{BITSANDBYTES}'")


def read_parts(parts: Iterable[str]) -> tuple[str, ...]:
    """The parts in the order of `PARTS`.

    Raises:
        InputError: an unknown part, or no "language".
    """
    wanted = [parts] if isinstance(parts, str) else list(parts)
    unknown = [part for part in wanted if part not in PARTS]
    if unknown:
        raise InputError(f"quantize: {', '.join(map(repr, unknown))} is none of {', '.join(PARTS)}")
    if "language" not in wanted:
        raise InputError("quantize: the language model is always among the parts in 4 bits: add 'language'")
    return tuple(part for part in PARTS if part in wanted)


def quantized_parts(config: QwenVLConfig, where: str = "the checkpoint") -> tuple[str, ...]:
    """The parts that a checkpoint stores in NF4, by its config; none for a 16-bit one.

    None for one packed by GPTQ too, which is read as the 16-bit weights that it stands for (`qwenvl.checkpoint.gptq`).

    Args:
        where: the checkpoint, for messages.

    Raises:
        InputError: it is quantised in another way.
    """
    settings = _nf4_settings(config, where)
    return tuple(part for part in PARTS if settings is not None and _is_converted(_EXAMPLES[part], settings))


def stored_in_4_bits(config: QwenVLConfig) -> Callable[[str], bool]:
    """Whether a checkpoint with this config stores a linear weight, given its name, in 4 bits.

    Raises:
        InputError: as `quantized_parts`.
    """
    settings = _nf4_settings(config)
    return lambda name: settings is not None and _is_converted(name.removesuffix(".weight"), settings)


def _is_converted(module: str, settings: dict[str, Any]) -> bool:
    return should_convert_module(module, settings.get("llm_int8_skip_modules") or ["lm_head"])  # its default


def _nf4_settings(config: QwenVLConfig, where: str = "the checkpoint") -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint in NF4; None for one in 16 or 32 bits, or packed by GPTQ."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    settings = stored.to_dict() if isinstance(stored, QuantizationConfigMixin) else stored
    if not isinstance(settings, dict):
        raise InputError(f"{where}: quantization_config must be a mapping of names to values, not {settings!r}")
    if is_gptq(settings):
        read_settings(settings, f"{where}: quantization_config")
        return None
    if not settings.get("load_in_4bit") or settings.get("bnb_4bit_quant_type") != "nf4":
        method = settings.get("quant_method", "an unknown method")
        raise InputError(
            f"{where} is quantised by {method}, which is neither NF4 of bitsandbytes nor GPTQ. Use the 16-bit "
            "one it was made from, and quantization='nf4' to have it in 4 bits"
        )
    check_keys(settings, _RULES, f"{where}: quantization_config")
    return settings


def quantized_names(config: QwenVLConfig, parts: Collection[str]) -> frozenset[str]:
    """Names in the checkpoint of the weights that are in 4 bits when these parts are."""
    prefixes = tuple(_PREFIXES[part] for part in parts)
    linears = (tensor.name for tensor in expected_tensors(config) if tensor.linear)
    return frozenset(name for name in linears if name.startswith(prefixes))


def nf4_config(parts: Collection[str], dtype: torch.dtype | None = None) -> BitsAndBytesConfig:
    """Transformers' quantisation config for these parts; `dtype` is the compute dtype."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=modules_to_skip(parts),
    )


def modules_to_skip(parts: Collection[str]) -> list[str]:
    """Modules that stay in 16 bits, for `llm_int8_skip_modules`, which replaces Transformers' default (the head)."""
    skipped = ["transformer.visual.attn_pool" if "vision" in parts else "transformer.visual"]
    return skipped if "head" in parts else [*skipped, "lm_head"]
