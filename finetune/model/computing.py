"""What a run computes attention and layers with: `auto` settled, what cannot run refused, before weights are read."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from finetune.errors import UserError
from finetune.recipe import Model
from qwenvl import QwenVLForConditionalGeneration
from qwenvl.model.kernels import liger_runs, require_liger
from qwenvl.model.varlen_attention import VARLEN


@dataclass(frozen=True)
class Computing:
    """Attributes:
    attention: a name that Transformers knows, varlen included; see `qwenvl.model.varlen_attention`.
    kernels: see `qwenvl.model.kernels.use_kernels`.
    """

    attention: str
    kernels: str

    def __str__(self) -> str:
        names = {"varlen": "varlen attention (each sequence of a pack by itself)"}
        return f"{names.get(self.attention, f'{self.attention} attention')}, {self.kernels} kernels"


def settled_attention(model: Model) -> str:
    """auto is varlen everywhere: on a GPU in one kernel, on the CPU one sequence after the other, where it takes 20 to
    60 % off a step of a small model. What is not a pack goes through sdpa with it.
    """
    return VARLEN if model.attention == "auto" else model.attention


def choose_attention(model: Model) -> str:
    """As `settled_attention`, for this machine.

    Raises:
        UserError: flash_attention_2 where it cannot be.
    """
    if model.attention == "flash_attention_2" and not (torch.cuda.is_available() and is_flash_attn_2_available()):
        raise UserError(
            "model.attention: flash_attention_2 needs an NVIDIA GPU and the package flash-attn, and one of them is "
            "not here. Set model.attention: auto, which packs without it"
        )
    return settled_attention(model)


def choose_kernels(model: Model) -> str:
    """auto is liger where it is installed and runs, else torch.

    Raises:
        UserError: liger where it cannot run.
    """
    if model.kernels == "liger":
        try:
            require_liger()
        except ValueError as error:
            raise UserError(f"model.kernels: liger. {error}") from error
    if model.kernels == "auto":
        return "liger" if liger_runs() else "torch"
    return model.kernels


def choose_computing(model: Model) -> Computing:
    """Raises:
    UserError: the recipe names what cannot run here.
    """
    return Computing(choose_attention(model), choose_kernels(model))


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
