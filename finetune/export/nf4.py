"""A checkpoint in 4 bits: 9.7 GB where the published one has 19.3; 6.0 with vision tower and head too.

The folder loads with `load_model` like any other, and holds the same bits as the 16-bit checkpoint loaded with
quantization="nf4". It names that checkpoint: an adapter trained on one of them can be used on both.
"""

import gc
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.errors import Failed, UserError
from finetune.export.folder import writing_errors
from finetune.export.model_card import is_hub_id, write_card
from finetune.files.atomic_writes import writing_large_folder
from finetune.files.base_identity import hash_weights, identify
from finetune.files.checkpoint_folder import (
    CONFIG,
    chat_settings,
    companion_folder,
    copy_companions,
    dtype_settings,
    read_config,
    read_json,
)
from finetune.files.disk_space import check_disk_space
from finetune.files.tensor_files import Planned, tensor_bytes, write_tensors
from finetune.quantities import format_bytes
from finetune.terminal import Say, say
from qwenvl import QwenVLForConditionalGeneration, load_model
from qwenvl.checkpoint.checkpoint_files import locate_tensors
from qwenvl.checkpoint.record import BaseNote, trained_as, write_record
from qwenvl.loading import DTYPES, find_adapter, find_parts, find_source
from qwenvl.model.nf4_weights import BLOCK
from qwenvl.model.quantization import DEFAULT_PARTS, quantized_names, quantized_parts
from qwenvl.model.whole import require_whole

# Bytes beyond the codes of a 4-bit weight: its 16 levels and the 256 of its magnitudes, both float32, the rest of its
# state, and their entries in the file's header. Of every other tensor: its entry in the header.
STATE_BYTES = 16 * 4 + 256 * 4 + 1536
NAME_BYTES = 160


def export_nf4(
    source: str,
    to: Path,
    *,
    quantize: Sequence[str] = DEFAULT_PARTS,
    dtype: str | None = None,
    say: Say = say,
) -> None:
    """Write a checkpoint with its linears in 4 bits; the folder appears when it was read back and compared.

    Args:
        source: checkpoint folder or hub id, in 16 or 32 bits.
        to: folder to write; must not exist.
        quantize: the parts in 4 bits (see `qwenvl.model.quantization.PARTS`).
        dtype: of everything that is not in 4 bits, and of the weights before they are quantised; None as stored.
        say: prints a labelled line.

    Raises:
        InputError: nothing to export at `source`, `to` exists, too little disk space.
        Failed: what was read back is not what was written.
    """
    to, base = Path(to), _base_checkpoint(source)
    if to.exists():
        raise UserError(f"{to} exists already: give another folder, or remove that one")
    parts = find_parts(base, "nf4", quantize)
    needed = stored_bytes(base, parts, DTYPES.get(dtype or "auto"))
    check_disk_space(to, needed, "the 4-bit folder")
    require_whole(base)
    identity = identify(base)
    say("loading", f"{source}, in 4 bits: {', '.join(parts)}")
    model = load_model(base, quantization="nf4", quantize=parts, dtype=dtype)
    assert isinstance(model, QwenVLForConditionalGeneration), "a checkpoint without adapter"
    with writing_errors(to), writing_large_folder(to) as partial:
        say("writing", format_bytes(needed))
        settings = _config_settings(base, model)
        written = _digests(model)
        state = model.state_dict()
        plan = [Planned(name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()]
        write_tensors(partial, plan, state.items())
        record = trained_as(base)
        copy_companions(base, partial, config=settings, generation=chat_settings(base, record.chat_format))
        stored_as = model.dtype
        del model, state
        gc.collect()
        say("checking", "what was written, read back")
        _compare(written, _digests(load_model(partial)))
        noted = base if is_hub_id(base) else str(Path(base).resolve())
        record = replace(record, base=BaseNote(noted, identity), quantize=tuple(parts))
        write_record(partial, replace(record, own_weights=hash_weights(partial)))
        write_card(
            partial,
            title=f"{Path(base).name} in 4 bits",
            base=base,
            fingerprint=identity.fingerprint,
            facts={
                "in 4 bits": ", ".join(parts),
                "as": "NF4 with double quantisation, blocks of 64 values (bitsandbytes)",
                "all else": str(stored_as).removeprefix("torch."),
            },
            notes=["4-bit weights are an approximation: measure on your own task before relying on them."],
            tags=["4-bit", "bitsandbytes"],
        )
    say("written", to)


def stored_bytes(base: str, parts: Iterable[str], dtype: torch.dtype | None) -> int:
    """Bytes of a checkpoint's weights with these parts in 4 bits, the rest in `dtype` (None: as it is)."""
    in_4_bits = quantized_names(read_config(base), tuple(parts))
    total = 0
    for name, tensor in locate_tensors(base).items():
        count = prod(tensor.shape)
        if name in in_4_bits:
            blocks = ceil(count / BLOCK)
            total += ceil(count / 2) + blocks + 4 * ceil(blocks / 256) + STATE_BYTES
        else:
            total += count * (dtype or tensor.dtype).itemsize + NAME_BYTES
    return total


def _base_checkpoint(source: str) -> str:
    if find_adapter(source) is not None:
        raise UserError(f"{source} is an adapter: merge it into its base first (finetune merge), then export that")
    found = find_source(source)
    stored = quantized_parts(read_config(found.base), found.base)
    if stored:
        raise UserError(f"{source} is in 4 bits already: {', '.join(stored)}. Give the 16-bit checkpoint")
    return found.base


def _config_settings(base: str, model: QwenVLForConditionalGeneration) -> dict[str, Any]:
    """What changes in the published `config.json`."""
    published = read_json(companion_folder(base) / CONFIG)
    return dtype_settings(published, model.dtype) | {"quantization_config": model.config.quantization_config.to_dict()}


def _digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every tensor that is stored: 4-bit codes, the state to decode them, and everything else."""
    return {name: hashlib.sha256(tensor_bytes(tensor)).hexdigest() for name, tensor in model.state_dict().items()}


def _compare(written: dict[str, str], read: dict[str, str]) -> None:
    wrong = sorted(name for name in written.keys() | read.keys() if written.get(name) != read.get(name))
    if wrong:
        raise Failed(
            f"read back, {len(wrong)} of {len(written)} tensors are not what was written ({', '.join(wrong[:3])}): "
            "nothing was exported. Check the disk, or use another one"
        )
