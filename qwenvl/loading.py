"""Load models and processors from a hub id, a checkpoint folder, an adapter or a run."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import snapshot_download
from transformers.utils import cached_file

from qwenvl.base_check import check_base
from qwenvl.checkpoint.adapter_config import (
    PARTS_OF_MODULES,
    plain_key,
    read_adapter_config,
    refuse_unknown_keys,
    refuse_unsaved_modules,
)
from qwenvl.checkpoint.adapter_files import ADAPTER_CONFIG, read_adapter_settings, require_whole_adapter
from qwenvl.checkpoint.checkpoint_files import find_file
from qwenvl.checkpoint.record import BASE_FILE, RECORD, ModelRecord, read_record, trained_as
from qwenvl.errors import InputError, MissingFileError
from qwenvl.loading_errors import adapter_errors, checkpoint_errors, first_line
from qwenvl.model.configuration import QwenVLConfig
from qwenvl.model.generation import reply_as_trained
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
from qwenvl.model.whole import require_whole
from qwenvl.processor import QwenVLProcessor

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = logging.getLogger(__name__)

ADAPTER_FILES = [ADAPTER_CONFIG, "adapter_model.*", RECORD, BASE_FILE]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DeviceMap = str | Mapping[str, int | str | torch.device] | None
"""A device, a strategy such as "auto", or devices by module name, as in Transformers."""


@dataclass(frozen=True)
class ModelSource:
    """What a path refers to: a base checkpoint (folder or hub id) and the folder of an adapter on it, or None."""

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
    device_map: DeviceMap = None,
) -> "QwenVLForConditionalGeneration | PeftModel":
    """Load a model in eval mode, with its adapter if there is one.

    Args:
        path: hub id, checkpoint folder or exported folder; or an adapter folder (PEFT's format) or a run folder, whose
            base is then found.
        adapter: adapter or run folder, or hub id, of an adapter for `path`.
        quantization: "nf4" quantises linear layers to 4 bits, one tensor after the other while they are read, and on
            the GPU if there is one and no device_map is given. "none" loads 16 or 32 bits. None loads a checkpoint as
            stored, in 4 bits or not, and the base of an adapter as it was when the adapter was trained.
        quantize: with "nf4", the parts in 4 bits: "language", and optionally "vision" and "head" (see
            `quantization.PARTS`). None: those that the checkpoint has in 4 bits, or the adapter was trained on, else
            the language model only.
        embeddings_on_cpu: keep the token embeddings in host memory, whatever the device of the rest.
        dtype: "float32", "bfloat16", "float16", or "auto" or None for the dtype of the checkpoint.
        device_map: as in Transformers.

    Raises:
        MissingFileError: no model at `path`, or the adapter's base is not where the adapter says.
        InputError: a damaged checkpoint or adapter; a base other than the one the adapter was trained on; adapter
            weights that do not fit the model; or a quantisation that is unknown, that the checkpoint contradicts or
            that needs bitsandbytes.
    """
    source = find_source(path, adapter=adapter)
    # Before its base is loaded, which may take minutes.
    adapter_reading = None if source.adapter is None else read_adapter(source.adapter)
    record = trained_as(source.base, source.adapter)
    refuse_other_record(source, record)
    parts = find_parts(source.base, quantization, quantize, trained=record.quantize if source.adapter else ())
    kind = WithoutEmbeddings if embeddings_on_cpu else QwenVLForConditionalGeneration
    with checkpoint_errors(source.base):
        if parts:
            model = _load_4bit(kind, source.base, parts, _read_dtype(dtype), device_map)
        else:
            model = kind.from_pretrained(source.base, dtype=_read_dtype(dtype), device_map=device_map)
    if embeddings_on_cpu:
        read_embeddings(model, source.base)
    model = model.eval()
    if model.generation_config is not None:
        reply_as_trained(model.generation_config, model.config, record)
    if source.adapter is None or adapter_reading is None:
        return model
    return add_adapter(model, source.base, source.adapter, adapter_reading)


def find_parts(
    base: str,
    quantization: str | None = None,
    quantize: Iterable[str] | None = None,
    *,
    trained: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """The parts of a checkpoint that `load_model` with these arguments has in 4 bits; none: it is in 16 or 32 bits.

    Args:
        trained: those that were in 4 bits when the adapter on it was trained.

    Raises:
        InputError: an unknown quantisation or part, one that the checkpoint contradicts, or no bitsandbytes.
    """
    if quantization not in (None, "none", "nf4"):
        raise InputError(f"quantization must be nf4, none or None, not {quantization!r}")
    if quantization != "nf4" and quantize is not None:
        raise InputError("quantize has no effect without quantization='nf4': give both or neither")
    stored = quantized_parts(QwenVLConfig.from_pretrained(base), base)
    if stored and quantization == "none":
        raise InputError(
            f"{base} holds 4-bit weights ({', '.join(stored)}): for quantization none, give the 16-bit checkpoint "
            "that it was made from"
        )
    if quantization == "nf4":
        wanted = read_parts(quantize or stored or trained or DEFAULT_PARTS)
    else:
        wanted = stored if quantization is None and stored else trained if quantization is None else ()
    if stored and wanted != stored:
        raise InputError(
            f"{base} is in 4 bits already: {', '.join(stored)}. That cannot be loaded as {', '.join(wanted)}: give "
            "the 16-bit checkpoint it was made from, or leave quantize out"
        )
    if wanted:
        require_bitsandbytes()
    return wanted


def refuse_other_record(source: ModelSource, record: ModelRecord) -> None:
    """Check that the record of a checkpoint is about its own weights, in 4 bits or not.

    Raises:
        InputError: it names other parts than those that are in 4 bits: it is of another folder.
    """
    stored = quantized_parts(QwenVLConfig.from_pretrained(source.base), source.base)
    if source.adapter is None and record.quantize and record.quantize != stored:
        there = f"{', '.join(stored)} in 4 bits" if stored else "no 4-bit weights"
        raise InputError(
            f"{Path(source.base) / RECORD}: quantize names {', '.join(record.quantize)}, and the folder holds "
            f"{there}: the record is of another folder. Restore the folder's own, or delete the file"
        )


def _load_4bit(
    kind: type[QwenVLForConditionalGeneration],
    base: str,
    parts: tuple[str, ...],
    dtype: str | torch.dtype,
    device_map: DeviceMap,
) -> QwenVLForConditionalGeneration:
    stored = quantized_parts(QwenVLConfig.from_pretrained(base))
    # On the CPU bitsandbytes needs 16 bytes per value while it quantises: too much for the head, by far the largest.
    head_later = "head" in parts and not stored and _puts_head_on_cpu(device_map)
    first = tuple(part for part in parts if part != "head" or not head_later)
    model = kind.from_pretrained(
        base, dtype=dtype, device_map=device_map, quantization_config=None if stored else nf4_config(first)
    )
    if head_later:
        model.lm_head = linear_4bit(model.lm_head)
        model.config.quantization_config.llm_int8_skip_modules = modules_to_skip(parts)
    compute_in(model, dtype if isinstance(dtype, torch.dtype) else model.dtype)
    return model


def _puts_head_on_cpu(device_map: DeviceMap) -> bool:
    device = device_map.get("lm_head", device_map.get("")) if isinstance(device_map, Mapping) else device_map
    if device is None or device in ("auto", "balanced", "balanced_low_0", "sequential"):
        return not torch.cuda.is_available()
    return device == "disk" or torch.device(device).type == "cpu"


def load_processor(path: str | Path) -> QwenVLProcessor:
    """Load the processor of a hub id, a checkpoint, or the base of an adapter or run, with the system message that the
    model was trained under, for conversations that bring none, and with the views that its images were.

    `QwenVLProcessor.from_pretrained` and `AutoProcessor` read both too, but know no adapters and no runs.

    Raises:
        MissingFileError: nothing to load at `path`.
        InputError: a text-only or a damaged checkpoint.
    """
    source = find_source(path)
    processor = QwenVLProcessor.from_pretrained(source.base)
    record = trained_as(source.base, source.adapter)
    processor.system, processor.views = record.system, record.views
    return processor


def require_loadable(path: str | Path, *, adapter: str | Path | None = None) -> ModelSource:
    """As `find_source`, and check that what is there is whole: for commands, before they begin.

    Reads settings and the headers of weights, which takes a second for a checkpoint of 19 GB.

    Raises:
        MissingFileError: as `find_source`, or weights are missing.
        InputError: as `find_source`; or a file is damaged, or tensors are missing, too many or of another shape.
    """
    source = find_source(path, adapter=adapter)
    require_whole(source.base)
    if source.adapter is not None:
        require_whole_adapter(source.adapter)
    return source


def find_source(path: str | Path, *, adapter: str | Path | None = None) -> ModelSource:
    """Find out what a path refers to, without loading weights. An adapter on the hub is downloaded.

    Args:
        path: as `load_model` takes it.
        adapter: adapter or run folder, or hub id, of an adapter for `path`, whatever base it names itself.

    Raises:
        MissingFileError: nothing to load at `path`, no adapter at `adapter`, or an adapter whose base is missing.
        InputError: a checkpoint of another kind of model, a damaged adapter, or an adapter for an adapter.
    """
    try:
        if adapter is not None:
            if find_adapter(path) is not None:
                raise InputError(
                    f"{path} is an adapter itself: give the base checkpoint as path, or leave adapter out"
                )
            folder = find_adapter(adapter)
            if folder is None:
                raise MissingFileError(f"{adapter}: no {ADAPTER_CONFIG} here, so this is not an adapter")
            return ModelSource(find_source(path).base, str(folder))
        found = find_adapter(path)
        if found is not None:
            return ModelSource(_base_of(found), str(found))
        return _checkpoint_in_folder(path) or _checkpoint_on_hub(str(path))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error


def find_adapter(path: str | Path) -> Path | None:
    """The folder of an adapter, whose base need not be there; None where `path` is no adapter.

    Args:
        path: adapter folder, run folder, or hub id (its files are downloaded).

    Raises:
        MissingFileError: neither a folder nor a hub id that can be reached.
    """
    folder = Path(path)
    for place in (folder / "adapter", folder):  # a run folder, or the adapter's own
        if (place / ADAPTER_CONFIG).is_file():
            return place
    if folder.exists() or not _looks_like_hub_id(str(path)):
        return None
    if find_file(path, ADAPTER_CONFIG) is None:
        return None
    return Path(snapshot_download(str(path), allow_patterns=ADAPTER_FILES))


def _checkpoint_in_folder(path: str | Path) -> ModelSource | None:
    """None if there is no such folder and the path may be a hub id."""
    folder = Path(path)
    if (folder / "model" / "config.json").is_file():  # a run folder of a training without adapter
        folder = folder / "model"
    if (folder / "config.json").is_file():
        _refuse_other_kind(folder)
        return ModelSource(str(folder), None)
    if folder.exists():
        raise MissingFileError(f"{path}: neither config.json (a checkpoint) nor {ADAPTER_CONFIG} (an adapter) is here")
    if not _looks_like_hub_id(str(path)):
        raise MissingFileError(f"{path}: no such folder")
    return None


def _checkpoint_on_hub(name: str) -> ModelSource:
    _require_on_hub(name)
    return ModelSource(name, None)


def _refuse_other_kind(folder: Path) -> None:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # QwenVLConfig reports a damaged file when it is loaded
    if kind not in (None, QwenVLConfig.model_type):
        raise InputError(
            f"{folder} holds a model of type {kind!r}, and Qwen-VL is of type {QwenVLConfig.model_type!r}"
        )


def _require_on_hub(name: str) -> None:
    """Check that a hub id is in the cache or can be downloaded.

    Raises:
        MissingFileError: it is not, or cannot.
    """
    try:
        cached_file(name, "config.json")
    except OSError as error:
        raise MissingFileError(
            f"{name}: there is no such folder, and it cannot be loaded as a hub id: {first_line(error)}. Without a "
            "network, download it beforehand (hf download) or give a folder"
        ) from error


def _base_of(adapter: Path) -> str:
    """The base that an adapter names: an absolute folder, one relative to the adapter or here, or a hub id.

    Adapters of this toolkit name a folder by its absolute path. Where that is gone, as on another machine, the path
    that the training was given is tried too.
    """
    base = read_adapter_settings(adapter).get("base_model_name_or_path")
    if not base:
        raise MissingFileError(
            f"{adapter}: the adapter names no base: give it with --base BASE, or load_model(BASE, "
            f"adapter={str(adapter)!r})"
        )
    record = read_record(adapter)
    noted = base if record is None or record.base is None else record.base.path
    for folder in (adapter / base, Path(base), Path(noted)):
        if (folder / "config.json").is_file():
            return str(folder)
    if not _looks_like_hub_id(base):
        raise MissingFileError(
            f"{adapter}: the adapter's base {base} is not there. If it was moved, give its new place with --base "
            f"BASE, or load_model(BASE, adapter={str(adapter)!r})"
        )
    try:
        _require_on_hub(base)
    except MissingFileError as error:
        raise MissingFileError(
            f"{adapter}: the adapter's base: {error}. If it is somewhere else, give its place with --base BASE, or "
            f"load_model(BASE, adapter={str(adapter)!r})"
        ) from error
    return base


@dataclass(frozen=True)
class AdapterReading:
    """How PEFT is to read an adapter.

    Attributes:
        config: its settings; None for PEFT to read them (other methods than LoRA).
        key_mapping: PEFT's argument; None where the keys are as PEFT saves them.
    """

    config: "PeftConfig | None"
    key_mapping: dict[str, str] | None


def read_adapter(adapter: str) -> AdapterReading:
    """Check an adapter before its base is loaded, by the rules of `checkpoint.adapter_config`.

    Raises:
        MissingFileError: a file of it is missing.
        InputError: it is damaged, not complete, or does something that PEFT cannot compute from its folder.
    """
    from peft import LoraConfig

    names = [tensor.name for tensor in require_whole_adapter(adapter)]
    settings = read_adapter_config(adapter)
    key_mapping = {PARTS_OF_MODULES: ""} if any(plain_key(name) != name for name in names) else None
    if settings.get("peft_type") != "LORA":
        return AdapterReading(None, key_mapping)
    known = {field.name for field in fields(LoraConfig)}
    refuse_unknown_keys(adapter, settings, known)
    refuse_unsaved_modules(adapter, settings, names)
    with adapter_errors(adapter):
        config = LoraConfig(**{key: value for key, value in settings.items() if key in known - {"runtime_config"}})
    return AdapterReading(config, key_mapping)


def add_adapter(
    model: "QwenVLForConditionalGeneration | PeftModel",
    base: str,
    adapter: str,
    reading: AdapterReading,
    *,
    name: str = "default",
) -> "PeftModel":
    """Put an adapter into a model; the first makes a `PeftModel` of it, around the same module.

    Args:
        model: `base`, without adapters or with others, in eval mode.
        base: folder or hub id of its checkpoint.
        adapter: folder.
        reading: `read_adapter(adapter)`.
        name: what PEFT calls the adapter; not in the model yet.

    Raises:
        InputError: the adapter was trained on another base, is damaged, or does not fit. The model may have parts of
            the adapter then: `remove_adapter` takes them out.
    """
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import ModulesToSaveWrapper, load_peft_weights

    # From the cache where the files are as they were, so that loading need not read 19 GB twice.
    if not check_base(adapter, base, page_cache=True, cached=True):
        logger.warning(
            "%s does not record the weights that it was trained on: it is loaded on %s unchecked", adapter, base
        )
    with adapter_errors(adapter, base):
        if isinstance(model, PeftModel):
            adapted = model
            if reading.config is not None:  # otherwise PEFT reads it
                reading.config.inference_mode = True
                adapted.add_adapter(name, reading.config)
            adapted.load_adapter(adapter, name, key_mapping=reading.key_mapping)
        else:
            adapted = PeftModel.from_pretrained(
                model, adapter, adapter_name=name, config=reading.config, key_mapping=reading.key_mapping
            )
        adapted.eval()
        weights = load_peft_weights(adapter, device="cpu", key_mapping=reading.key_mapping)
    stored, loaded = set(weights), set(get_peft_model_state_dict(adapted, adapter_name=name))
    if stored != loaded:
        raise InputError(
            f"{adapter}: the adapter does not fit {base}. Without a place in the model: {_some(stored - loaded)}; "
            f"missing from the adapter: {_some(loaded - stored)}"
        )
    # Modules trained in full beside LoRA were trained in float32; PEFT casts them to the dtype of a 16-bit base.
    copies = [
        module.modules_to_save[name]
        for module in adapted.modules()
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save
    ]
    if copies and any(tensor.dtype == torch.float32 for tensor in weights.values()):
        for copy in copies:
            copy.float()
        set_peft_model_state_dict(adapted, weights, adapter_name=name)
    return adapted


def _some(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"


def _looks_like_hub_id(name: str) -> bool:
    """`owner/name` or `name`, and nothing that is only in the path of a folder."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and "\\" not in name


def _read_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None or dtype == "auto":
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)} or auto, not {dtype!r}")
    return DTYPES[dtype]
