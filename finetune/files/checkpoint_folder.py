"""The files beside a checkpoint's weights, read and copied: what loading, chatting and passing it on need."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import InputError, MissingFileError, UserError
from finetune.files.atomic_writes import write_text
from finetune.files.path_errors import path_errors
from finetune.terminal import Say

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

    from qwenvl import QwenVLConfig, QwenVLTokenizer

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
CARD = "README.md"

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

    The copy of a checkpoint packed by GPTQ says nothing of that: its weights are written as the 16-bit ones that they
    stand for.

    Args:
        source: checkpoint folder or hub id.
        folder: exists; files of the same names are replaced.
        generation: top-level keys to set in `generation_config.json` (None removes one). With `chat_format: chatml`,
            set here or there already, `eos_token_id` is the integer of the published folders (see
            `qwenvl.model.generation.published_eos`).
        config: top-level keys to set in `config.json`, whose other keys stay as they are; see `dtype_settings`.

    Returns:
        The names of the files, sorted.

    Raises:
        MissingFileError: no checkpoint at `source`.
        UserError: a file cannot be read, or one of the configs is not valid.
        OSError: the disk of `folder` is full or fails.
    """
    from qwenvl.checkpoint.gptq import is_gptq

    source_folder = companion_folder(source)
    files = companion_files(source_folder)
    for file in files:
        copy_file(file, folder / file.name)
    names = {file.name for file in files}
    read = read_json(source_folder / CONFIG)
    if is_gptq(read.get("quantization_config")):
        config = {"quantization_config": None, **(config or {})}
    if config:
        read = _changed(read, config)
        _write_json(folder / CONFIG, read)
    settings = _generation_settings(source_folder, generation or {})
    if settings and (GENERATION_CONFIG not in names or settings != read_json(source_folder / GENERATION_CONFIG)):
        _write_json(folder / GENERATION_CONFIG, settings)
        names.add(GENERATION_CONFIG)
    return sorted(names)


def chat_settings(source: str | Path, chat_format: str | None) -> dict[str, Any] | None:
    """What `copy_companions` has to change in `generation_config.json` for a model of this format: None where the
    source's says it already, or nothing is known."""
    file = companion_folder(source) / GENERATION_CONFIG
    said = read_json(file).get("chat_format") if file.is_file() else None
    return None if chat_format in (None, said) else {"chat_format": chat_format}


def complete_trained_folder(folder: Path, base: str | Path, dtype: "torch.dtype") -> None:
    """Make a folder that Transformers saved after a training one that the published code can load too.

    The base's other files are copied into it, its code (which is never run here) among them, and `config.json` says
    as the base's does where that code is and what type the weights are of. The toolkit trains ChatML, whatever the
    base was.

    Args:
        folder: with weights and configs.
        base: folder or hub id of the checkpoint that was trained.
        dtype: of the weights.

    Raises:
        UserError: a file of the base cannot be read.
        OSError: the disk is full or fails.
    """
    source = companion_folder(base)
    for file in companion_files(source):
        if file.name not in (CONFIG, GENERATION_CONFIG):
            copy_file(file, folder / file.name)
    published = read_json(source / CONFIG)
    kept = {key: published[key] for key in ("architectures", "auto_map") if key in published}
    config = read_json(folder / CONFIG)
    _write_json(folder / CONFIG, config | kept | dtype_settings(config, dtype))
    _write_json(folder / GENERATION_CONFIG, _generation_settings(folder, {"chat_format": "chatml"}))


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
    """The files at the top level of a checkpoint folder that are neither weights nor notes, in name order.

    Not links out of the folder, whose targets would be copied; see `say_links_left_out`.
    """
    from qwenvl.checkpoint.own_files import is_own_file

    return [file for file in _companions(folder) if is_own_file(file, folder)]


def own_card(folder: Path) -> Path | None:
    """The model card of a checkpoint folder; None where it has none, or a link out of the folder."""
    from qwenvl.checkpoint.own_files import is_own_file

    return folder / CARD if is_own_file(folder / CARD, folder) else None


def say_links_left_out(source: str | Path, say: Say) -> None:
    """Say which files beside a checkpoint's weights are not copied, because they are links out of its folder."""
    folder = companion_folder(source)
    own = {*companion_files(folder), own_card(folder)}
    for file in (*_companions(folder), *([folder / CARD] if (folder / CARD).is_symlink() else [])):
        if file not in own:
            say("left out", f"{file.name}: it is a link out of {folder}, and what it leads to is not the checkpoint's")


def _companions(folder: Path) -> list[Path]:
    with path_errors(folder, "read", "Make it readable"):
        files = sorted(path for path in folder.iterdir() if path.is_symlink() or path.is_file())
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
    """How a `config.json` says that its weights are of this type: in the key of the published files, which
    Transformers read before version 5, and in others that it has."""
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config or key == "torch_dtype"]
    return dict.fromkeys(keys, name) | {flag: kind == name for flag, kind in PRECISION_FLAGS.items() if flag in config}


def say_dtype(folder: Path, dtype: "torch.dtype") -> None:
    """Make a saved folder's `config.json` say what type its weights are to be loaded in: float32 masters are there.

    Raises:
        OSError: the disk is full or fails.
    """
    config = read_json(folder / CONFIG)
    _write_json(folder / CONFIG, config | dtype_settings(config, dtype))


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        MissingFileError: there is no such file.
        UserError: it cannot be read, or holds something else (see `qwenvl.checkpoint.json_files`).
    """
    from qwenvl.checkpoint import json_files

    try:
        return json_files.read_json(path)
    except MissingFileError:
        raise
    except InputError as error:
        raise UserError(str(error)) from None


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


def _generation_settings(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The generation settings of a checkpoint, none where it has no such file, with changes and in published form."""
    from qwenvl.model.generation import SAMPLING_ONLY, published_eos, read_published_settings

    file = folder / GENERATION_CONFIG
    settings = _changed(read_json(file) if file.is_file() else {}, changes)
    if changes.get("chat_format") == "chatml":
        read = read_published_settings(_generation_config(settings, file), read_config(folder))
        chat: dict[str, Any] = {"eos_token_id": read.eos_token_id, "pad_token_id": read.pad_token_id}
        # Sampling settings beside greedy decoding, which Transformers would refuse to save again.
        chat |= {key: None for key in SAMPLING_ONLY if key in settings and getattr(read, key) is None}
        settings = _changed(settings, chat)
    if "eos_token_id" in settings:
        settings["eos_token_id"] = published_eos(settings["eos_token_id"], settings.get("chat_format"))
    return settings


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _changed(read: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    changed = read | changes
    return {key: value for key, value in changed.items() if value is not None or key not in changes}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
