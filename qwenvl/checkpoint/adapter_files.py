"""Whether an adapter folder in PEFT's format is whole: its settings and its weights, before PEFT sees them."""

import re
from pathlib import Path
from typing import Any

from qwenvl.checkpoint.checkpoint_files import StoredTensor, tensors_in
from qwenvl.checkpoint.json_files import read_json
from qwenvl.checkpoint.own_files import refuse_foreign_file
from qwenvl.checkpoint.settings import FLAG, NOTHING, OBJECT, RULES, TEXT, Rule, check_keys, is_number, is_whole, only
from qwenvl.errors import InputError, MissingFileError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in the order in which PEFT looks for them
NOTES = ("base.json", "qwenvl.json")

LARGEST_RANK = 1 << 20


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_wholes(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_whole, value))


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _is_rank(value: Any) -> bool:
    return is_whole(value) and 0 < value <= LARGEST_RANK


def _by_name(is_one: Any) -> Any:
    return lambda value: isinstance(value, dict) and all(map(is_one, value.values()))


def _is_pattern(value: Any) -> bool:
    """A text is a regular expression for PEFT."""
    try:
        return _is_names(value) or (isinstance(value, str) and re.compile(value) is not None)
    except re.error:
        return False


_NAMES: Rule = (lambda value: isinstance(value, str) or _is_names(value), "a list of names or a text")
_PATTERN: Rule = (_is_pattern, "a list of names or a text that is a regular expression")

KEYS: dict[str, Rule] = {
    "peft_type": TEXT,
    "base_model_name_or_path": TEXT,
    "r": (_is_rank, "a positive whole number"),
    "lora_alpha": (_is_positive, "a positive number"),
    "lora_dropout": (lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
    **dict.fromkeys(("target_modules", "exclude_modules"), _PATTERN),
    "layers_pattern": _NAMES,
    "bias": only("none", "all", "lora_only"),
    "modules_to_save": (_is_names, "a list of names"),
    "layers_to_transform": (
        lambda value: is_whole(value) or _is_wholes(value),
        "a whole number or a list of them",
    ),
    "rank_pattern": (_by_name(_is_rank), "a positive number for each module"),
    "alpha_pattern": (_by_name(_is_positive), "a positive number for each module"),
    "trainable_token_indices": (
        lambda value: _is_wholes(value) or _by_name(_is_wholes)(value),
        "a list of token ids, or one for each module",
    ),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "inference_mode"), FLAG),
    "init_lora_weights": (lambda value: isinstance(value, bool | str), "true, false or a text"),
    **dict.fromkeys(("eva_config", "corda_config", "loftq_config", "lora_ga_config", "auto_mapping"), OBJECT),
    # PEFT imports `megatron_core` by its name where there is a `megatron_config`, and loads other adapters for Arrow.
    **dict.fromkeys(("megatron_config", "arrow_config"), NOTHING),
}
"""What the keys of `adapter_config.json` must be."""


def read_adapter_settings(folder: str | Path) -> dict[str, Any]:
    """Read an adapter's `adapter_config.json`.

    Raises:
        MissingFileError: there is none.
        InputError: it is damaged, a link out of the folder, or has a value that it must not have; names the key.
    """
    file = Path(folder) / ADAPTER_CONFIG
    if not file.exists() and not file.is_symlink():
        raise MissingFileError(f"{folder}: no {ADAPTER_CONFIG} here, so this is not an adapter")
    refuse_foreign_file(file, Path(folder))
    settings = read_json(file)
    check_keys(settings, KEYS, file)
    return settings


def weights_file(folder: str | Path) -> Path:
    """The file of an adapter's weights.

    Raises:
        MissingFileError: there is none.
    """
    for name in ADAPTER_WEIGHTS:
        file = Path(folder) / name
        if file.exists() or file.is_symlink():  # a link to nowhere is no reason to take the next
            return file
    raise MissingFileError(f"{folder}: the adapter's weights are missing (looked for {' or '.join(ADAPTER_WEIGHTS)})")


def require_whole_adapter(folder: str | Path) -> list[StoredTensor]:
    """Check an adapter before it is used: settings, notes on its base, and the file of its weights.

    Returns:
        Its tensors.

    Raises:
        MissingFileError: no weights, or no settings.
        InputError: a file is damaged, cut short, an LFS pointer, or no file of the folder's own.
    """
    folder = Path(folder)
    read_adapter_settings(folder)
    for name in NOTES:
        if (folder / name).exists() or (folder / name).is_symlink():
            refuse_foreign_file(folder / name, folder)
            check_keys(read_json(folder / name), RULES.get(name, {}), folder / name)
    file = weights_file(folder)
    tensors = tensors_in(file)
    if not tensors:
        raise InputError(f"{file} holds no tensors: it is not an adapter's file of weights, fetch it again")
    for tensor in tensors:
        if not tensor.dtype.is_floating_point:
            raise InputError(
                f"{file}: {tensor.name} is of type {tensor.dtype}: an adapter's weights are floating-point numbers"
            )
    return tensors
