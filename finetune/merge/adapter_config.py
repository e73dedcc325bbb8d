"""Where an adapter is, and its settings as far as they decide what its weights mean: understood or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.errors import MissingFileError, UserError
from finetune.files.checkpoint_folder import read_json
from finetune.files.path_errors import path_errors

ADAPTER_CONFIG = "adapter_config.json"
MERGE_FILE = "merge.json"  # of a merged folder, see `folder.py`

# Keys of an adapter's config that are read here, and those that do not change what the saved weights mean.
UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "bias", "lora_bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("trainable_token_indices", "init_lora_weights"),
}
WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "megatron_config", "megatron_core", "runtime_config", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # those that matter go by init_lora_weights
    "fan_in_fan_out",  # for Conv1D layers, which Qwen does not have: PEFT itself turns it off on the others
    "enable_lora",  # null in the published script's adapters of 2023
}
# How LoRA's matrices started: those that leave the base as it is, and those that take what they start with out of it.
INIT_KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
INIT_TAKES_FROM_BASE = ("pissa", "olora")


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_name_or_names(value: Any) -> bool:
    return isinstance(value, str) or _is_names(value)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(number, int) for number in value)


def _is_number_or_numbers(value: Any) -> bool:
    return isinstance(value, int) or _is_numbers(value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _is_positive_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_positive, value.values()))


def _is_rows(value: Any) -> bool:
    return all(map(_is_numbers, value.values())) if isinstance(value, dict) else _is_numbers(value)


# What the values that are read here must be, unless they are null or left out.
EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base_model_name_or_path": (lambda value: isinstance(value, str), "a text"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "rank_pattern": (_is_positive_by_name, "a positive number for each module"),
    "alpha_pattern": (_is_positive_by_name, "a positive number for each module"),
    "target_modules": (_is_name_or_names, "a list of names or a text"),
    "exclude_modules": (_is_name_or_names, "a list of names or a text"),
    "modules_to_save": (_is_names, "a list of names"),
    "layers_to_transform": (_is_number_or_numbers, "a whole number or a list of them"),
    "layers_pattern": (_is_name_or_names, "a list of names or a text"),
    "trainable_token_indices": (_is_rows, "a list of token ids, or one for each module"),
}


def find_adapter(path: Path) -> Path:
    """The folder of the adapter in a run folder, or of an adapter by itself.

    Raises:
        UserError: a run or checkpoint without an adapter; says what it is.
        MissingFileError: none of these is at `path`.
    """
    with path_errors(path, "read", "Check the path"):
        if (path / MERGE_FILE).is_file():
            raise UserError(f"{path} is a merged checkpoint already: use it as it is")
        adapter = path / "adapter" if (path / "adapter" / ADAPTER_CONFIG).is_file() else path
        if (adapter / ADAPTER_CONFIG).is_file():
            return adapter
        if (path / "model" / "config.json").is_file():
            raise UserError(f"{path} was trained without an adapter: {path / 'model'} is a whole checkpoint already")
        if (path / "run.json").is_file():
            raise UserError(f"{path} has no adapter yet: the run did not finish. Go on with it: the same command")
        if (path / "config.json").is_file():
            raise UserError(f"{path} is a whole checkpoint: there is no adapter to merge")
    raise MissingFileError(f"{path}: no {ADAPTER_CONFIG} here, so this is neither a run nor an adapter")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read an adapter's `adapter_config.json`.

    Raises:
        MissingFileError: there is none.
        UserError: it is not one of LoRA, has a value of the wrong kind, or says something that changes what LoRA
            computes and is not understood here.
    """
    place = folder / ADAPTER_CONFIG
    if not place.is_file():
        raise MissingFileError(f"{folder}: no {ADAPTER_CONFIG} here, so this is not an adapter")
    config = read_json(place)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{place}: peft_type is {config.get('peft_type')}; only LORA can be merged")
    for key in ("r", "lora_alpha"):
        if not _is_positive(config.get(key)):
            raise UserError(f"{place}: {key} is {config.get(key)!r} instead of a positive number")
    for key, (is_expected, expected) in EXPECTED.items():
        if config.get(key) is not None and not is_expected(config[key]):
            raise UserError(f"{place}: {key} is {config[key]!r} instead of {expected}")
    for key, value in config.items():
        if value and key not in UNDERSTOOD | WITHOUT_EFFECT:
            raise UserError(
                f"{place}: {key} is {value!r}: it changes what the adapter computes in a way that cannot be merged "
                f"here. Merge it with PEFT (merge_and_unload)"
            )
    init = config.get("init_lora_weights", True)
    if init not in INIT_KEEPS_BASE + INIT_TAKES_FROM_BASE:
        raise UserError(
            f"{place}: init_lora_weights is {init!r}: it changed the base in a way that cannot be computed again. "
            "Save the adapter as plain LoRA first (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion), or merge it where it was trained"
        )
    return config
