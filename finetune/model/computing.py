"""How a recipe's model is loaded and computed on this machine.

Loading: dtype, device and 4-bit arguments, as `qwenvl.load_model` takes them. Computing: the attention implementation
and the layers' kernels, with `auto` settled, and refused before weights are read where this machine cannot run them.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from finetune.errors import InputError, UserError
from finetune.recipe import Model
from qwenvl import QwenVLForConditionalGeneration
from qwenvl.checkpoint.checkpoint_files import locate_tensors
from qwenvl.loading import DTYPES
from qwenvl.model.kernels import liger_runs, require_liger
from qwenvl.model.varlen_attention import VARLEN

# --- loading ---------------------------------------------------------------------------------------------------------


def choose_dtype(setting: str) -> str:
    """Settle `model.dtype`: "auto" is bfloat16 on a GPU that supports it, float16 on any other GPU, and stays "auto"
    (the checkpoint's own dtype) on the CPU.
    """
    if setting != "auto" or not torch.cuda.is_available():
        return setting
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def computing_dtype(model: Model, base: str, stored: torch.dtype | None) -> torch.dtype:
    """The dtype that a checkpoint is loaded in, which its frozen weights and all activations have; as `choose_dtype`,
    with "auto" settled as Transformers does.

    Args:
        base: folder or hub id of the checkpoint.
        stored: what its configuration says; None where that does not.
    """
    chosen = choose_dtype(model.dtype)
    if chosen != "auto":
        return DTYPES[chosen]
    if stored is not None:
        return stored
    return next(tensor.dtype for tensor in locate_tensors(base).values() if tensor.dtype.is_floating_point)


def quantization_arguments(model: Model) -> dict[str, Any]:
    """The recipe's 4-bit settings as arguments of `load_model`."""
    return {} if model.quantization == "none" else {"quantization": model.quantization, "quantize": model.quantize}


def own_device() -> dict[str, int | str]:
    """A `device_map` that puts all of the model on this process's GPU, or on the CPU where there is none."""
    return {"": int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"}


def is_random(model: QwenVLForConditionalGeneration) -> bool:
    """Whether a checkpoint's config says that its weights were never trained (`random_weights`)."""
    return bool(getattr(model.config, "random_weights", False))


# --- computing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComputeBackends:
    """What attention and layers are computed with.

    Attributes:
        attention: an implementation registered with Transformers; "varlen" is `qwenvl.model.varlen_attention`.
        kernels: "torch" or "liger"; see `qwenvl.model.kernels.use_kernels`.
    """

    attention: str
    kernels: str

    def __str__(self) -> str:
        names = {"varlen": "varlen attention (each sequence of a pack by itself)"}
        return f"{names.get(self.attention, f'{self.attention} attention')}, {self.kernels} kernels"


def choose_backends(model: Model) -> ComputeBackends:
    """Settle `model.attention` and `model.kernels` for this machine.

    Raises:
        UserError: the recipe names a backend that cannot run here.
    """
    return ComputeBackends(choose_attention(model), choose_kernels(model))


def settled_attention(model: Model) -> str:
    """`model.attention`, where "auto" is varlen on every device.

    On a GPU varlen is one kernel. On the CPU it computes one sequence after the other, which makes a step of a small
    model 20 to 60 % faster. Batches that are not packed are computed by sdpa all the same.
    """
    return VARLEN if model.attention == "auto" else model.attention


def choose_attention(model: Model) -> str:
    """As `settled_attention`, checked against this machine.

    Raises:
        UserError: flash_attention_2 where it cannot run.
    """
    if model.attention == "flash_attention_2" and not (torch.cuda.is_available() and is_flash_attn_2_available()):
        raise UserError(
            "model.attention: flash_attention_2 needs an NVIDIA GPU and the package flash-attn, and one of them is "
            "not here. Set model.attention: auto, which packs without it"
        )
    return settled_attention(model)


def choose_kernels(model: Model) -> str:
    """`model.kernels`, where "auto" is liger if it is installed and runs here, else torch.

    Raises:
        UserError: liger where it cannot run.
    """
    if model.kernels == "liger":
        try:
            require_liger()
        except InputError as error:
            raise UserError(f"model.kernels: liger. {error}") from error
    if model.kernels == "auto":
        return "liger" if liger_runs() else "torch"
    return model.kernels
