"""A checkpoint folder made complete: everything beside the weights that loading, chatting and passing on need."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.files.atomic_writes import write_text

if TYPE_CHECKING:
    import torch

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"

# What belongs to a checkpoint beside its weights. The published folders have the code that other programs run them
# with (*.py), which draws boxes with a font of its own (SimSun.ttf); here none of it is run.
COMPANIONS = (
    *(CONFIG, GENERATION_CONFIG),
    *("*.tiktoken", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("processor_config.json", "preprocessor_config.json", "chat_template.*"),
    *("*.py", "*.ttf", "*.otf", "*.ttc"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "Tongyi*LICENSE*"),
)
PRECISION_FLAGS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def copy_companions(
    source: str | Path,
    folder: Path,
    *,
    generation: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> list[str]:
    """Copy what stands beside a checkpoint's weights, byte for byte but for the two configs that are changed.

    Args:
        source: checkpoint folder or hub id.
        folder: exists; files of the same names are replaced.
        generation: top-level keys to set in `generation_config.json` (None removes one). `chat_format: chatml` brings
            what follows from it: where replies end.
        config: top-level keys to set in `config.json`, whose other keys stay as they are; see `dtype_settings`.

    Returns:
        The names of the files, sorted.

    Raises:
        FileNotFoundError: no checkpoint at `source`.
        ValueError: one of the configs is not JSON.
    """
    source_folder = companion_folder(source)
    files = companion_files(source_folder)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    names = {file.name for file in files}
    read = read_json(source_folder / CONFIG)
    if config:
        read = _changed(read, config)
        _write_json(folder / CONFIG, read)
    if generation:
        settings = read_json(source_folder / GENERATION_CONFIG) if GENERATION_CONFIG in names else {}
        settings = _changed(settings, generation)
        if generation.get("chat_format") == "chatml":
            settings = _changed(settings, _chat_settings(settings, read))
        _write_json(folder / GENERATION_CONFIG, settings)
        names.add(GENERATION_CONFIG)
    return sorted(names)


def companion_folder(source: str | Path) -> Path:
    """The folder with a checkpoint's configs: itself, or the hub cache's snapshot (fetched, or found where there is no
    network).

    Raises:
        FileNotFoundError: no checkpoint at `source`.
    """
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(str(source), allow_patterns=list(COMPANIONS)))
        except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(f"{source}: no folder here, and as a hub id it cannot be had: {reason}") from error
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG} here, so this is not a checkpoint")
    return folder


def companion_files(folder: Path) -> list[Path]:
    """The files in a checkpoint folder that are neither weights nor somebody's notes, in name order."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [file for file in files if any(fnmatch(file.name, pattern) for pattern in COMPANIONS)]


def dtype_settings(config: dict[str, Any], dtype: "torch.dtype") -> dict[str, Any]:
    """How a `config.json` says that its weights are of this type, in the keys that it has."""
    name = str(dtype).removeprefix("torch.")
    key = "dtype" if "dtype" in config else "torch_dtype"
    return {key: name} | {flag: kind == name for flag, kind in PRECISION_FLAGS.items() if flag in config}


def read_json(path: Path) -> dict[str, Any]:
    """Raises:
    ValueError: the file is not a JSON object.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): restore it") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path} holds a {type(read).__name__} where an object is expected: restore it")
    return read


def _chat_settings(settings: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What `chat_format: chatml` means for `generate`, written out for programs that read only the usual keys."""
    from transformers import GenerationConfig

    from qwenvl import QwenVLConfig
    from qwenvl.model.generation import SAMPLING_ONLY, read_published_settings

    read = read_published_settings(GenerationConfig(**settings), QwenVLConfig.from_dict(config))
    changes = {"eos_token_id": read.eos_token_id, "pad_token_id": read.pad_token_id}
    # Sampling settings beside greedy decoding, which Transformers would refuse to save again.
    return changes | {key: None for key in SAMPLING_ONLY if key in settings and getattr(read, key) is None}


def _changed(read: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    changed = read | changes
    return {key: value for key, value in changed.items() if value is not None or key not in changes}


def _write_json(path: Path, content: dict[str, Any]):
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
