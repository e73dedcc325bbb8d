"""Adapters in PEFT's format, of any program: what their settings and the names of their tensors must be.

Loading and merging check by the same rules. What cannot be computed from an adapter's folder is refused, as the model
would not be the trained one.
"""

import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from qwenvl.checkpoint.checkpoint_files import read_json, tensors_in
from qwenvl.errors import InputError, MissingFileError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# Keys of other programs that served the training alone: ms-swift's of 2024 (how the weights were stored, and LoRA+'s
# learning rates), and one of PEFT's of 2023, null in the published script's adapters.
TRAINING_ONLY = frozenset({"lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "enable_lora"})

# How LoRA's matrices started: those that leave the base as it is, and those that take what they start with out of it,
# which can be computed again from the base.
INIT_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
INIT_TAKES_FROM_BASE = ("pissa", "olora")
INIT_AT_RANDOM = re.compile(r"pissa_niter_\d+")
CONVERT = (
    "Save it as plain LoRA where it was trained (PEFT's save_pretrained with "
    "path_initial_model_for_weight_conversion, which needs the adapter from before the training), or train again "
    "with another init_lora_weights"
)

# Parts of keys that PEFT leaves out when it saves: some programs save the names of the modules in memory.
PARTS_OF_MODULES = r"\.(?:modules_to_save(?:\.default)?|default)(?=\.|$)"

CHECKPOINT_FOLDER = re.compile(r"checkpoint-(\d+)")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


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


# What the values of a LoRA adapter must be, unless they are null or left out.
EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base_model_name_or_path": (_is_text, "a text"),
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


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """Read an adapter's `adapter_config.json`, without the keys that served its training alone.

    Only LoRA's settings are checked: those of PEFT's other methods are PEFT's to check.

    Raises:
        MissingFileError: there is none.
        InputError: it is damaged, has a value of the wrong kind, or says that the base was changed before the training
            in a way that cannot be computed again.
    """
    place = Path(folder) / ADAPTER_CONFIG
    if not place.is_file():
        raise MissingFileError(f"{folder}: no {ADAPTER_CONFIG} here, so this is not an adapter")
    config = {key: value for key, value in read_json(place).items() if key not in TRAINING_ONLY}
    if config.get("peft_type") != "LORA":
        return config
    for key in ("r", "lora_alpha"):
        if not _is_positive(config.get(key)):
            raise InputError(f"{place}: {key} is {config.get(key)!r} instead of a positive number")
    for key, (is_expected, expected) in EXPECTED.items():
        if config.get(key) is not None and not is_expected(config[key]):
            raise InputError(f"{place}: {key} is {config[key]!r} instead of {expected}")
    _refuse_init(place, config.get("init_lora_weights", True))
    return config


def _refuse_init(place: Path, init: Any) -> None:
    """Raises:
    InputError: LoRA's initialisation changed the base in a way that cannot be computed again.
    """
    if init in INIT_KEEPS_BASE + INIT_TAKES_FROM_BASE:
        return
    if isinstance(init, str) and INIT_AT_RANDOM.fullmatch(init):
        what = "it took a part out of the base by a method with random numbers, which cannot be computed again"
    else:
        what = "it may have changed the base before the training, in a way that cannot be computed again"
    raise InputError(f"{place}: init_lora_weights is {init!r}: {what}. {CONVERT}")


def refuse_unknown_keys(folder: str | Path, config: dict[str, Any], known: Collection[str]) -> None:
    """Check that nothing in an adapter's configuration is passed over: keys that are off say nothing.

    Args:
        known: the keys that the reader understands.

    Raises:
        InputError: another key has a value.
    """
    for key, value in config.items():
        if value and key not in known:
            raise InputError(
                f"{Path(folder) / ADAPTER_CONFIG}: {key} is {value!r}, which the installed PEFT does not know: it may "
                f"change what the adapter computes. Update PEFT; or, if {key} only served the training, remove it "
                "from the file"
            )


def weights_file(folder: str | Path) -> Path:
    """The file of an adapter's weights.

    Raises:
        MissingFileError: there is none.
    """
    for name in ADAPTER_WEIGHTS:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    names = " or ".join(ADAPTER_WEIGHTS)
    raise MissingFileError(f"{folder}: the adapter's weights are missing (looked for {names})")


def plain_key(name: str) -> str:
    """The key as PEFT saves it, of one that names a module in memory (`...wte.modules_to_save.default.weight`)."""
    return re.sub(PARTS_OF_MODULES, "", name)


def refuse_unsaved_modules(folder: str | Path, config: dict[str, Any], names: Iterable[str]) -> None:
    """Check that the modules that were trained in full are in the adapter's file.

    The published fine-tuning script leaves an adapter without them in the folder that it trains into; the
    `checkpoint-N` folders inside have them.

    Args:
        names: of the tensors.

    Raises:
        InputError: some are not there; names the folder that has them.
    """
    missing = _unsaved_modules(config, names)
    if not missing:
        return
    beside = _complete_beside(Path(folder), missing)
    remedy = f"Use {beside}, which has them" if beside else "Save the adapter again from the training's checkpoint"
    raise InputError(
        f"{folder}: by {ADAPTER_CONFIG} {' and '.join(missing)} were trained in full (modules_to_save), but the "
        f"adapter's file lacks their weights: without these it is not the trained model. {remedy}"
    )


def _unsaved_modules(config: dict[str, Any], names: Iterable[str]) -> list[str]:
    keys = [plain_key(name) for name in names]
    return [
        module for module in config.get("modules_to_save") or [] if not any(_is_within(key, module) for key in keys)
    ]


def _is_within(key: str, module: str) -> bool:
    """Whether a tensor belongs to a module trained in full, which PEFT finds by the end of its name."""
    parts = key.split(".")
    ends = [".".join(parts[:count]) for count in range(1, len(parts))]
    return ".lora_" not in key and any(end.endswith(module) for end in ends)


def _complete_beside(folder: Path, modules: list[str]) -> Path | None:
    """The newest `checkpoint-N`, in the adapter's folder or beside it, that has the modules' weights."""
    numbered = [
        (int(match[1]), path)
        for parent in (folder, folder.resolve().parent)
        for path in parent.iterdir()
        if (match := CHECKPOINT_FOLDER.fullmatch(path.name)) and path.is_dir()
    ]
    for _, path in sorted(numbered, reverse=True):
        try:
            names = [tensor.name for tensor in tensors_in(weights_file(path))]
        except InputError:
            continue
        if not _unsaved_modules({"modules_to_save": modules}, names):
            return path
    return None
