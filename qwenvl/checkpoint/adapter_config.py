"""Adapters in PEFT's format, of any program: what their settings and the names of their tensors must be.

Loading and merging check by the same rules. What cannot be computed from an adapter's folder is refused, as the model
would not be the trained one.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from qwenvl.checkpoint.adapter_files import ADAPTER_CONFIG, read_adapter_settings, weights_file
from qwenvl.checkpoint.checkpoint_files import tensors_in
from qwenvl.errors import InputError

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


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """Read an adapter's `adapter_config.json`, without the keys that served its training alone.

    Only LoRA's settings are checked: those of PEFT's other methods are PEFT's to check.

    Raises:
        MissingFileError: there is none.
        InputError: it is damaged, has a value of the wrong kind, or says that the base was changed before the training
            in a way that cannot be computed again.
    """
    place = Path(folder) / ADAPTER_CONFIG
    config = {key: value for key, value in read_adapter_settings(folder).items() if key not in TRAINING_ONLY}
    if config.get("peft_type") != "LORA":
        return config
    for key in ("r", "lora_alpha"):
        if config.get(key) is None:
            raise InputError(f"{place}: {key} is missing: restore the file")
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
