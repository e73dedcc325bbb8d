"""The files beside a checkpoint's weights, read and copied: what loading, chatting and passing it on need."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import MissingFileError, UserError
from finetune.files.atomic_writes import write_text
from finetune.files.path_errors import path_errors

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

    from qwenvl import QwenVLConfig, QwenVLTokenizer

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"

# What belongs to a checkpoint beside its weights: files at its top level, never those of sub-folders. The published
# folders have the code that other programs run them with (*.py), which draws boxes with a font of its own
# (SimSun.ttf); here none of it is run.
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
    """Copy the files beside a checkpoint's weights, byte for byte except for the two configs where keys are changed.

    Args:
        source: checkpoint folder or hub id.
        folder: exists; files of the same names are replaced.
        generation: top-level keys to set in `generation_config.json` (None removes one). `chat_format: chatml` also
            sets the tokens at which replies end.
        config: top-level keys to set in `config.json`, whose other keys stay as they are; see `dtype_settings`.

    Returns:
        The names of the files, sorted.

    Raises:
        MissingFileError: no checkpoint at `source`.
        UserError: a file cannot be read, or one of the configs is not valid.
        OSError: the disk of `folder` is full or fails.
    """
    source_folder = companion_folder(source)
    files = companion_files(source_folder)
    for file in files:
        copy_file(file, folder / file.name)
    names = {file.name for file in files}
    read = read_json(source_folder / CONFIG)
    if config:
        read = _changed(read, config)
        _write_json(folder / CONFIG, read)
    if generation:
        settings = read_json(source_folder / GENERATION_CONFIG) if GENERATION_CONFIG in names else {}
        settings = _changed(settings, generation)
        if generation.get("chat_format") == "chatml":
            chat = _chat_settings(settings, read_config(source_folder), source_folder / GENERATION_CONFIG)
            settings = _changed(settings, chat)
        _write_json(folder / GENERATION_CONFIG, settings)
        names.add(GENERATION_CONFIG)
    return sorted(names)


def chat_settings(source: str | Path, chat_format: str | None) -> dict[str, Any] | None:
    """What `copy_companions` has to change in `generation_config.json` for a model of this format: None where the
    source's says it already, or nothing is known."""
    file = companion_folder(source) / GENERATION_CONFIG
    said = read_json(file).get("chat_format") if file.is_file() else None
    return None if chat_format in (None, said) else {"chat_format": chat_format}


def companion_folder(source: str | Path) -> Path:
    """The folder with a checkpoint's configs: itself, or the hub cache's snapshot (fetched, or found where there is no
    network).

    Raises:
        MissingFileError: no checkpoint at `source`.
    """
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            # Its patterns know no folders: `*.py` alone would fetch those of sub-folders too.
            folder = Path(snapshot_download(str(source), allow_patterns=list(COMPANIONS), ignore_patterns="*/*"))
        except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise MissingFileError(
                f"{source}: no folder here has this name, and as a hub id it cannot be fetched: {_first_line(error)}"
            ) from error
    if not (folder / CONFIG).is_file():
        raise MissingFileError(f"{folder}: no {CONFIG} here, so this is not a checkpoint")
    return folder


def companion_files(folder: Path) -> list[Path]:
    """The files at the top level of a checkpoint folder that are neither weights nor notes, in name order."""
    with path_errors(folder, "read", "Make it readable"):
        files = sorted(path for path in folder.iterdir() if path.is_file())
    return [file for file in files if any(fnmatch(file.name, pattern) for pattern in COMPANIONS)]


def copy_file(file: Path, to: Path) -> None:
    """Copy a checkpoint's file.

    Raises:
        UserError: it cannot be read.
        OSError: `to` cannot be written.
    """
    with path_errors(file, "read", "Make it readable, or restore it"):
        content = file.read_bytes()
    to.write_bytes(content)


def dtype_settings(config: dict[str, Any], dtype: "torch.dtype") -> dict[str, Any]:
    """How a `config.json` says that its weights are of this type, in the keys that it has."""
    name = str(dtype).removeprefix("torch.")
    key = "dtype" if "dtype" in config else "torch_dtype"
    return {key: name} | {flag: kind == name for flag, kind in PRECISION_FLAGS.items() if flag in config}


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        with path_errors(path, "read", "Make it readable, or restore it"):
            read = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): restore it") from None
    if not isinstance(read, dict):
        raise UserError(f"{path} holds a {type(read).__name__} where an object is expected: restore it")
    return read


def read_config(source: str | Path) -> "QwenVLConfig":
    """The configuration of a checkpoint.

    Raises:
        MissingFileError: no checkpoint at `source`.
        UserError: its `config.json` is not that of a Qwen-VL model.
    """
    from qwenvl import QwenVLConfig

    folder = companion_folder(source)
    read_json(folder / CONFIG)  # which says what is wrong where it is not JSON
    try:
        return QwenVLConfig.from_pretrained(folder)
    except (TypeError, AttributeError) as error:  # Transformers' own keys with a value of another kind
        raise UserError(f"{folder / CONFIG} does not describe a Qwen-VL model ({_first_line(error)})") from error


def read_generation_config(source: str | Path) -> "GenerationConfig":
    """The generation settings of a checkpoint; the defaults where it has no such file.

    Raises:
        MissingFileError: no checkpoint at `source`.
        UserError: its `generation_config.json` cannot be used.
    """
    from transformers import GenerationConfig

    file = companion_folder(source) / GENERATION_CONFIG
    return _generation_config(read_json(file), file) if file.is_file() else GenerationConfig()


def read_tokenizer(source: str | Path) -> "QwenVLTokenizer":
    """The tokenizer of a checkpoint.

    Raises:
        MissingFileError: no checkpoint at `source`.
        UserError: its vocabulary or settings are missing or damaged.
    """
    from qwenvl import QwenVLTokenizer

    return QwenVLTokenizer.from_pretrained(companion_folder(source))


def _generation_config(settings: dict[str, Any], file: Path) -> "GenerationConfig":
    from transformers import GenerationConfig

    for key in ("eos_token_id", "pad_token_id"):
        ids = settings.get(key)
        if ids is not None and not all(isinstance(token, int) for token in (ids if isinstance(ids, list) else [ids])):
            raise UserError(f"{file}: {key} is {ids!r}, which is no token id: correct it")
    try:
        return GenerationConfig(**settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: its settings cannot be used ({_first_line(error)}): correct it") from error


def _chat_settings(settings: dict[str, Any], config: "QwenVLConfig", file: Path) -> dict[str, Any]:
    """What `chat_format: chatml` means for `generate`, written out for programs that read only the usual keys."""
    from qwenvl.model.generation import SAMPLING_ONLY, read_published_settings

    read = read_published_settings(_generation_config(settings, file), config)
    changes = {"eos_token_id": read.eos_token_id, "pad_token_id": read.pad_token_id}
    # Sampling settings beside greedy decoding, which Transformers would refuse to save again.
    return changes | {key: None for key in SAMPLING_ONLY if key in settings and getattr(read, key) is None}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _changed(read: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    changed = read | changes
    return {key: value for key, value in changed.items() if value is not None or key not in changes}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
