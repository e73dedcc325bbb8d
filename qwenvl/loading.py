"""Models and processors from whatever a practitioner has: a hub id, a checkpoint, an adapter, a run."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import snapshot_download
from transformers.utils import cached_file

from qwenvl.checkpoint.fingerprint import BASE_FILE, check_base, trained_parts
from qwenvl.model.configuration import QwenVLConfig
from qwenvl.model.host_embedding import WithoutEmbeddings, read_embeddings
from qwenvl.model.modeling import QwenVLForConditionalGeneration
from qwenvl.model.nf4_weights import compute_in, linear_4bit
from qwenvl.model.quantization import (
    DEFAULT_PARTS,
    modules_to_skip,
    nf4_config,
    quantized_parts,
    read_parts,
    require_bitsandbytes,
)
from qwenvl.processor import QwenVLProcessor

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = [ADAPTER_CONFIG, "adapter_model.*", BASE_FILE]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """What a path stands for: a base checkpoint (folder or hub id), and the folder of an adapter on it, or None."""

    base: str
    adapter: str | None


def load_model(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    quantization: str | None = None,
    quantize: Iterable[str] | None = None,
    embeddings_on_cpu: bool = False,
    dtype: str | torch.dtype | None = None,
    device_map: str | dict | None = None,
) -> "QwenVLForConditionalGeneration | PeftModel":
    """Load a model in eval mode, with its adapter if there is one.

    Args:
        path: hub id, checkpoint or exported folder; or an adapter folder (PEFT's format) or a run folder, whose base
            is then found.
        adapter: adapter or run folder, or hub id, to put on `path`.
        quantization: "nf4" holds linears in 4 bits, made tensor by tensor while they are read; on the GPU where there
            is one and device_map says nothing. None is as stored: a folder that is in 4 bits already stays so.
        quantize: with "nf4", the parts in 4 bits: "language", and "vision" and "head" if wished (see
            `quantization.PARTS`). None: those that the checkpoint has in 4 bits, or the adapter was trained on, else
            the language model's.
        embeddings_on_cpu: keep the token embeddings in host memory, wherever the rest is.
        dtype: "float32", "bfloat16", "float16", or "auto" and None for the one the checkpoint is stored in.
        device_map: as in Transformers.

    Raises:
        FileNotFoundError: no model at `path`, or the adapter's base is not where the adapter says.
        ValueError: a base other than the adapter was trained on, adapter weights that do not all find their place,
            or a quantisation that there is not, that the checkpoint contradicts or that needs bitsandbytes.
    """
    source = find_source(path)
    if adapter is not None:
        if source.adapter is not None:
            raise ValueError(f"{path} is an adapter itself: give the base checkpoint as path, or leave adapter out")
        source = Source(source.base, find_source(adapter).adapter or _not_an_adapter(adapter))
    if quantization is not None and quantize is None and source.adapter is not None:
        quantize = trained_parts(source.adapter) or None
    parts = find_parts(source.base, quantization, quantize)
    kind = WithoutEmbeddings if embeddings_on_cpu else QwenVLForConditionalGeneration
    if parts:
        model = _load_4bit(kind, source.base, parts, _read_dtype(dtype), device_map)
    else:
        model = kind.from_pretrained(source.base, dtype=_read_dtype(dtype), device_map=device_map)
    if embeddings_on_cpu:
        read_embeddings(model, source.base)
    model = model.eval()
    return model if source.adapter is None else _put_adapter(model, source)


def find_parts(base: str, quantization: str | None = None, quantize: Iterable[str] | None = None) -> tuple[str, ...]:
    """The parts of a checkpoint that will be in 4 bits when it is loaded so (see `load_model`); none: 16 or 32 bits.

    Raises:
        ValueError: an unknown quantisation or part, one that the checkpoint contradicts, or no bitsandbytes.
    """
    if quantization not in (None, "nf4"):
        raise ValueError(f"quantization must be nf4 or None, not {quantization!r}")
    if quantization is None and quantize is not None:
        raise ValueError("quantize has no effect without quantization='nf4': give both or neither")
    stored = quantized_parts(QwenVLConfig.from_pretrained(base))
    wanted = stored if quantization is None else read_parts(quantize or stored or DEFAULT_PARTS)
    if stored and wanted != stored:
        raise ValueError(
            f"{base} is in 4 bits already: {', '.join(stored)}. That cannot be loaded as {', '.join(wanted)}: give "
            "the 16-bit checkpoint it was made from, or leave quantize out"
        )
    if wanted:
        require_bitsandbytes()
    return wanted


def _load_4bit(
    kind: type[QwenVLForConditionalGeneration],
    base: str,
    parts: tuple[str, ...],
    dtype: str | torch.dtype,
    device_map: str | dict | None,
) -> QwenVLForConditionalGeneration:
    stored = quantized_parts(QwenVLConfig.from_pretrained(base))
    # On the CPU bitsandbytes takes 16 bytes a value while it quantises: too much for the head, by far the largest.
    head_later = "head" in parts and not stored and _puts_head_on_cpu(device_map)
    first = tuple(part for part in parts if part != "head" or not head_later)
    model = kind.from_pretrained(
        base, dtype=dtype, device_map=device_map, quantization_config=None if stored else nf4_config(first)
    )
    if head_later:
        model.lm_head = linear_4bit(model.lm_head)
        model.config.quantization_config.llm_int8_skip_modules = modules_to_skip(parts)
    compute_in(model, model.dtype if dtype == "auto" else dtype)
    return model


def _puts_head_on_cpu(device_map: str | dict | None) -> bool:
    device = device_map.get("lm_head", device_map.get("")) if isinstance(device_map, dict) else device_map
    if device is None or device in ("auto", "balanced", "balanced_low_0", "sequential"):
        return not torch.cuda.is_available()
    return device == "disk" or torch.device(device).type == "cpu"


def load_processor(path: str | Path) -> QwenVLProcessor:
    """Load the processor of a hub id, a checkpoint, or an adapter's or run's base.

    Raises:
        FileNotFoundError: nothing to load at `path`.
        ValueError: a text-only checkpoint.
    """
    return QwenVLProcessor.from_pretrained(find_source(path).base)


def find_source(path: str | Path) -> Source:
    """Tell what a path stands for, without loading weights. An adapter on the hub is fetched.

    Raises:
        FileNotFoundError: a folder without any of it, or an adapter whose base is missing.
        ValueError: a checkpoint of another kind of model.
    """
    folder = Path(path)
    if (folder / "adapter" / ADAPTER_CONFIG).is_file():  # a run folder
        folder = folder / "adapter"
    if (folder / ADAPTER_CONFIG).is_file():
        return Source(_base_of(folder), str(folder))
    if (folder / "model" / "config.json").is_file():  # a run folder of a training without adapter
        folder = folder / "model"
    if (folder / "config.json").is_file():
        _refuse_other_kind(folder)
        return Source(str(folder), None)
    if folder.exists():
        raise FileNotFoundError(
            f"{path}: neither config.json (a checkpoint) nor {ADAPTER_CONFIG} (an adapter) is here"
        )
    if not _looks_like_hub_id(str(path)):
        raise FileNotFoundError(f"{path}: no such folder")
    config = cached_file(
        str(path),
        ADAPTER_CONFIG,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if config is None:
        _require_on_hub(str(path))
        return Source(str(path), None)
    folder = Path(snapshot_download(str(path), allow_patterns=ADAPTER_FILES))
    return Source(_base_of(folder), str(folder))


def _refuse_other_kind(folder: Path):
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError):
        return  # which whoever reads the config says better
    if kind not in (None, QwenVLConfig.model_type):
        raise ValueError(
            f"{folder} holds a model of type {kind!r}, and Qwen-VL is of type {QwenVLConfig.model_type!r}"
        )


def _require_on_hub(name: str):
    """Raises:
    FileNotFoundError: the id is not in the hub's cache, and the hub cannot give it.
    """
    try:
        cached_file(name, "config.json")
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{name}: no folder here has this name, and as a hub id it cannot be had: {reason}. Where there is no "
            "network, fetch it beforehand (hf download) or give a folder"
        ) from error


def _base_of(adapter: Path) -> str:
    """The base that an adapter names: an absolute folder, one relative to the adapter or here, or a hub id."""
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if not base:
        raise FileNotFoundError(f"{adapter}: the adapter names no base; load it with load_model(<base>, adapter=...)")
    for folder in (adapter / base, Path(base)):
        if (folder / "config.json").is_file():
            return str(folder)
    if not _looks_like_hub_id(base):
        raise FileNotFoundError(
            f"{adapter}: the adapter's base {base} is not there. If it was moved: load_model(<its new place>, "
            f"adapter={str(adapter)!r})"
        )
    return base


def _put_adapter(model: QwenVLForConditionalGeneration, source: Source) -> "PeftModel":
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import ModulesToSaveWrapper, load_peft_weights

    if not check_base(source.adapter, source.base):
        logger.warning(
            "%s does not say which weights it was trained on: it is put on %s unchecked", source.adapter, source.base
        )
    adapted = PeftModel.from_pretrained(model, source.adapter).eval()
    weights = load_peft_weights(source.adapter, device="cpu")
    stored, placed = set(weights), set(get_peft_model_state_dict(adapted))
    if stored != placed:
        raise ValueError(
            f"{source.adapter}: the adapter does not fit {source.base}. Without a place in the model: "
            f"{_some(stored - placed)}; missing from the adapter: {_some(placed - stored)}"
        )
    # Modules trained in full beside LoRA were trained in float32: on a 16-bit base PEFT would round them.
    copies = [module.modules_to_save for module in adapted.modules() if isinstance(module, ModulesToSaveWrapper)]
    if copies and any(tensor.dtype == torch.float32 for tensor in weights.values()):
        for copy in copies:
            copy.float()
        set_peft_model_state_dict(adapted, weights)
    return adapted


def _some(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"


def _not_an_adapter(path: str | Path):
    raise FileNotFoundError(f"{path}: no {ADAPTER_CONFIG} here, so this is not an adapter")


def _looks_like_hub_id(name: str) -> bool:
    """`owner/name` or `name`, and no way to spell a folder."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and "\\" not in name


def _read_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None or dtype == "auto":
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)} or auto, not {dtype!r}")
    return DTYPES[dtype]
