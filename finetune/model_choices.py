"""How a model is loaded here: its type, its device, its 4-bit parts."""

import os
from typing import Any

import torch

from finetune.recipe import Model
from qwenvl import QwenVLForConditionalGeneration


def choose_dtype(setting: str) -> str:
    """ "auto" is bfloat16 on a GPU that has it, float16 on one that has not, and as stored on the CPU."""
    if setting != "auto" or not torch.cuda.is_available():
        return setting
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def quantization_arguments(model: Model) -> dict[str, Any]:
    """What a recipe says of 4 bits, for `load_model`."""
    return {} if model.quantization == "none" else {"quantization": model.quantization, "quantize": model.quantize}


def own_device() -> dict[str, int | str]:
    """A device_map for all of the model: 4-bit weights are made on the GPU of each process, and stay there."""
    return {"": int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"}


def is_random(model: QwenVLForConditionalGeneration) -> bool:
    """Whether a checkpoint says of itself that its weights were never trained (`random_weights` in its config)."""
    return bool(getattr(model.config, "random_weights", False))
