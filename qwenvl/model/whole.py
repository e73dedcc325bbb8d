"""Whether a checkpoint is whole: every tensor that its config asks for, in its shape, and no others.

The rule for every command and every loader, applied to the headers of the files before weights are read: what
Transformers does about a missing tensor is to fill it with random numbers and go on.
"""

import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

from qwenvl.checkpoint.checkpoint_files import StoredTensor, find_file, locate_tensors
from qwenvl.checkpoint.settings import examine_settings
from qwenvl.errors import InputError
from qwenvl.model.configuration import QwenVLConfig
from qwenvl.model.layout import ExpectedTensor, expected_tensors
from qwenvl.model.quantization import stored_in_4_bits

# Buffers that older programs saved, computed anew by every program.
LEFTOVERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|rotary_emb\._ntk_alpha_cached|masked_bias|logn_tensor)")

# What bitsandbytes stores beside a weight of 4-bit codes; the nested ones with double quantisation.
STATE = ("absmax", "quant_map", "quant_state.bitsandbytes__nf4")
NESTED_STATE = ("nested_absmax", "nested_quant_map")


def require_whole(path: str | Path, config: QwenVLConfig | None = None) -> dict[str, StoredTensor]:
    """Check a checkpoint before it is used: its settings, its weight files, and the one against the other.

    Reads the headers of the weights alone, so that a checkpoint of 19 GB takes a second.

    Args:
        path: checkpoint folder or hub id (whose files are fetched).
        config: the model that the weights are for; None for the checkpoint's own.

    Returns:
        Its tensors by name, as `locate_tensors`.

    Raises:
        MissingFileError: no checkpoint at `path`, or a file of weights is missing.
        InputError: a file is damaged or must not be followed, or tensors are missing, too many or of another shape;
            names the file or the tensor.
    """
    if Path(path).is_dir():
        examine_settings(path)
    config = QwenVLConfig.from_pretrained(path) if config is None else config
    stored = locate_tensors(path)
    if not Path(path).is_dir() and (file := find_file(path, "config.json")) is not None:
        examine_settings(file.parent)  # of a hub id, once it is fetched
    refuse_incomplete(path, stored, config)
    return stored


def refuse_incomplete(path: str | Path, stored: Mapping[str, StoredTensor], config: QwenVLConfig) -> None:
    """Compare a checkpoint's tensors with the model that its config describes.

    Args:
        path: of the checkpoint, for the message.
        stored: its tensors by name.

    Raises:
        InputError: a tensor is missing, is of another shape or type, or is no part of the model.
    """
    in_4_bits = stored_in_4_bits(config)
    known = set()
    for expected in expected_tensors(config):
        tensor = stored.get(expected.name)
        if tensor is None:
            raise InputError(
                f"{path}: {expected.name} is missing from its weights, though config.json asks for it: fetch the "
                "weights again, or restore config.json"
            )
        known.add(expected.name)
        if expected.linear and in_4_bits(expected.name):
            known.update(_check_in_4_bits(tensor, expected, stored, config))
        else:
            _check_in_full(tensor, expected)
    others = sorted(name for name in stored if name not in known and not LEFTOVERS.fullmatch(name))
    if others:
        raise InputError(
            f"{stored[others[0]].file}: {others[0]} is no part of the model that config.json describes"
            f"{f' ({len(others)} such tensors)' if len(others) > 1 else ''}: config and weights are not of the same "
            "model. Restore the one that was changed"
        )


def refuse_unloaded(path: str, missing: Iterable[str], mismatched: Iterable[tuple[str, object, object]]) -> None:
    """Check what Transformers reports after loading: it fills such tensors with random numbers.

    Raises:
        InputError: a tensor was not in the checkpoint, or in another shape.
    """
    for name, found, wanted in mismatched:
        raise InputError(
            f"{path}: {name} has shape {_shape(found)}, but config.json asks for {_shape(wanted)}: the two belong to "
            "different models"
        )
    names = sorted(missing)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(
            f"{path}: {', '.join(names[:3])}{more} missing from its weights: fetch them again. A new model with "
            "random weights is QwenVLForConditionalGeneration(config)"
        )


def _shape(shape: object) -> object:
    return tuple(shape) if isinstance(shape, Iterable) else shape


def _check_in_full(tensor: StoredTensor, expected: ExpectedTensor) -> None:
    if tensor.shape != expected.shape and not tensor.dtype.is_floating_point:
        raise InputError(
            f"{tensor.file}: {tensor.name} is of type {_name(tensor)}, as in quantised checkpoints, but config.json "
            "says nothing of this (quantization_config): restore config.json"
        )
    if tensor.shape != expected.shape:
        raise InputError(
            f"{tensor.file}: {tensor.name} has shape {tensor.shape}, but config.json asks for {expected.shape}: the "
            "two belong to different models"
        )
    if not tensor.dtype.is_floating_point:
        raise InputError(
            f"{tensor.file}: {tensor.name} is of type {_name(tensor)} where floating-point numbers are expected: "
            "fetch the weights again"
        )


def _check_in_4_bits(
    tensor: StoredTensor, expected: ExpectedTensor, stored: Mapping[str, StoredTensor], config: QwenVLConfig
) -> list[str]:
    """Check codes and their state; returns the names of the latter."""
    codes = (-(-prod(expected.shape) // 2), 1)
    if tensor.dtype.is_floating_point or tensor.shape != codes:
        raise InputError(
            f"{tensor.file}: {tensor.name} is {_name(tensor)} of shape {tensor.shape}, but by config.json it is in 4 "
            f"bits, bytes of shape {codes}: config and weights are not of the same model"
        )
    settings = config.quantization_config
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    parts = STATE + (NESTED_STATE if settings.get("bnb_4bit_use_double_quant") else ())
    names = [f"{expected.name}.{part}" for part in parts]
    for name in names:
        if name not in stored:
            raise InputError(
                f"{tensor.file}: {name} is missing, without which the 4-bit codes of {expected.name} cannot be read: "
                "fetch the weights again"
            )
    return names


def _name(tensor: StoredTensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
