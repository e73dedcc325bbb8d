"""Where an adapter is, and its settings as far as they decide what its weights mean: understood or refused."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from finetune.errors import MissingFileError, UserError
from finetune.files.path_errors import path_errors
from qwenvl.checkpoint import adapter_config
from qwenvl.checkpoint.adapter_config import refuse_unknown_keys
from qwenvl.checkpoint.adapter_files import ADAPTER_CONFIG

MERGE_FILE = "merge.json"  # of a merged folder, see `folder.py`

# PEFT's keys that are read here, and those that do not change what the saved weights mean.
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
    """Read an adapter's `adapter_config.json`, by the rules of loading (`qwenvl.checkpoint.adapter_config`) and those
    of merging.

    Raises:
        MissingFileError: there is none.
        InputError: it is damaged, or loading refuses it.
        UserError: it is not one of LoRA, or says something that changes what LoRA computes and is not understood here.
    """
    from peft import LoraConfig

    place = folder / ADAPTER_CONFIG
    with path_errors(place, "read", "Make it readable, or restore it"):
        config = adapter_config.read_adapter_config(folder)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{place}: peft_type is {config.get('peft_type')}; only LORA can be merged")
    refuse_unknown_keys(folder, config, {field.name for field in fields(LoraConfig)} | UNDERSTOOD | WITHOUT_EFFECT)
    for key, value in config.items():
        if value and key not in UNDERSTOOD | WITHOUT_EFFECT:
            raise UserError(
                f"{place}: {key} is {value!r}: it changes what the adapter computes in a way that cannot be merged "
                f"here. Merge it with PEFT (merge_and_unload)"
            )
    return config
