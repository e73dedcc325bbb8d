"""Where an adapter is, and its settings as far as they decide what its weights mean: understood or refused."""

import json
from pathlib import Path
from typing import Any

from finetune.errors import UserError

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


def find_adapter(path: Path) -> Path:
    """The folder of the adapter in a run folder, or of an adapter by itself.

    Raises:
        UserError: a run or checkpoint without an adapter; says what it is.
        FileNotFoundError: nothing of it at `path`.
    """
    if (path / MERGE_FILE).is_file():
        raise UserError(f"{path} is a merged checkpoint already: use it as it is")
    adapter = path / "adapter" if (path / "adapter" / ADAPTER_CONFIG).is_file() else path
    if not (adapter / ADAPTER_CONFIG).is_file():
        if (path / "model" / "config.json").is_file():
            raise UserError(f"{path} was trained without an adapter: {path / 'model'} is a whole checkpoint already")
        if (path / "run.json").is_file():
            raise UserError(f"{path} has no adapter yet: the run did not finish. Go on with it: the same command")
        if (path / "config.json").is_file():
            raise UserError(f"{path} is a whole checkpoint: there is no adapter to merge")
        raise FileNotFoundError(f"{path}: no {ADAPTER_CONFIG} here, so this is neither a run nor an adapter")
    return adapter


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """An adapter's `adapter_config.json`.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is not one of LoRA, or says something that changes what LoRA computes and is not understood here.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: no {ADAPTER_CONFIG} here, so this is not an adapter") from None
    except ValueError as error:
        raise UserError(f"{folder / ADAPTER_CONFIG} is not JSON ({error}): restore it") from None
    place = folder / ADAPTER_CONFIG
    if config.get("peft_type") != "LORA":
        raise UserError(f"{place}: peft_type is {config.get('peft_type')}; only LORA can be merged")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise UserError(f"{place}: {key} is {config.get(key)!r} instead of a positive number")
    for key, value in config.items():
        if value and key not in UNDERSTOOD | WITHOUT_EFFECT:
            raise UserError(
                f"{place}: {key} is {value!r}: it changes what the adapter computes in a way that cannot be merged "
                f"here. Merge it with PEFT (merge_and_unload)"
            )
    init = config.get("init_lora_weights", True)
    if init not in INIT_KEEPS_BASE + INIT_TAKES_FROM_BASE:
        raise UserError(
            f"{place}: init_lora_weights is {init!r}: the base was changed in a way that cannot be computed again "
            "from it. Save the adapter as plain LoRA first (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion), or merge it where it was trained"
        )
    return config
