"""A checkpoint packed by GPTQ, as arguments of Transformers' `from_pretrained`: 16-bit weights, read one by one.

By itself Transformers would run such a checkpoint through other programs' kernels, whose weights cannot be trained,
merged or quantised anew.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from qwenvl.checkpoint.checkpoint_files import GPTQ_CONFIG_NAME, locate_tensors
from qwenvl.checkpoint.gptq import DequantizedTensor, is_gptq
from qwenvl.checkpoint.stored_tensor import StoredTensor
from qwenvl.errors import InputError, MissingFileError
from qwenvl.model.configuration import QwenVLConfig
from qwenvl.model.generation import stored_generation_config

# Arguments of `from_pretrained` that say where on the hub, or in which of its caches, a checkpoint is.
PLACES = ("revision", "subfolder", "cache_dir", "variant", "key_mapping", "gguf_file")


class _Unread:
    """A tensor as Transformers takes it in a state dict: read when it is indexed, by one of its threads."""

    def __init__(self, stored: StoredTensor) -> None:
        self._stored = stored

    def __getitem__(self, index: EllipsisType) -> torch.Tensor:
        return self._stored.read()


def gptq_arguments(path: str | os.PathLike[str] | None, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `from_pretrained` takes in place of the path of a checkpoint that is packed by GPTQ.

    Args:
        path: folder or hub id.
        given: the arguments of `from_pretrained` beside it.

    Returns:
        The arguments given, with the state dict and a config without quantisation; the path must be None then. None
        for any other checkpoint, and where there is none.

    Raises:
        MissingFileError: a packed checkpoint has no weights.
        InputError: its config or weights cannot be read, or it cannot be loaded with these arguments.
    """
    if path is None or given.get("state_dict") is not None:
        return None
    config = _config(path, given)
    if config is None or not is_gptq_checkpoint(path, config):
        return None
    refused = [key for key in PLACES if given.get(key)]
    if refused:
        raise InputError(
            f"{path}: a checkpoint packed by GPTQ cannot be loaded with {', '.join(refused)}: download it "
            "(hf download), and give its folder alone"
        )
    if is_deepspeed_zero3_enabled():
        raise InputError(
            f"{path}: DeepSpeed ZeRO-3 cannot load a checkpoint packed by GPTQ: unpack it first "
            f"(finetune export {path} --to safetensors), and give that folder"
        )
    stored = locate_tensors(str(path))
    packed = [tensor for tensor in stored.values() if isinstance(tensor, DequantizedTensor)]
    if not packed:
        raise InputError(
            f"{path}: by its quantization_config its weights are packed by GPTQ, but they are not: remove "
            "quantization_config from config.json, or fetch the weights again"
        )
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if config.dtype is None:
        config.dtype = packed[0].dtype
    return {
        **given,
        "config": config,
        "state_dict": {name: _Unread(tensor) for name, tensor in stored.items()},
        "generation_config": given.get("generation_config") or stored_generation_config(str(path)),
    }


def _config(path: str | os.PathLike[str], given: Mapping[str, Any]) -> QwenVLConfig | None:
    """The config that `from_pretrained` would take; None where there is none, which it reports by itself (or finds the
    base of an adapter).
    """
    config = given.get("config")
    if isinstance(config, QwenVLConfig):
        return config
    place = {key: given[key] for key in ("revision", "subfolder", "cache_dir", "token") if given.get(key)}
    try:
        return QwenVLConfig.from_pretrained(path if config is None else config, **place)
    except MissingFileError:
        return None


def is_gptq_checkpoint(path: str | os.PathLike[str], config: QwenVLConfig) -> bool:
    """Whether a checkpoint is packed by GPTQ, by its config, or by AutoGPTQ's own in its folder."""
    quantization = getattr(config, "quantization_config", None)
    return is_gptq(quantization) or (quantization is None and (Path(path) / GPTQ_CONFIG_NAME).is_file())
