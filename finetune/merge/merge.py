"""Base + adapter -> a whole checkpoint, step by step: find both, compare them, write, check what was written.

Memory stays at a few large tensors however large the model is, because tensors are read, computed and written one
after the other. Only the check by logits loads the model, as its users will.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from finetune.errors import Failed, InputError, UserError
from finetune.export.model_card import training_sections, write_card
from finetune.files.atomic_writes import writing_large_folder
from finetune.files.byte_progress import byte_progress
from finetune.files.checkpoint_folder import (
    CARD,
    CONFIG,
    chat_settings,
    companion_folder,
    copy_companions,
    dtype_settings,
    read_config,
    read_generation_config,
    read_json,
    say_links_left_out,
)
from finetune.files.disk_space import check_disk_space
from finetune.files.output_paths import refuse_unwritable_folder
from finetune.files.tensor_files import SHARD_BYTES, file_hash, write_tensors
from finetune.merge.adapter_weights import AdapterWeights, read_adapter
from finetune.merge.check import check_merge, measure_rounding_to_4bit, prompt_of_base
from finetune.merge.folder import is_done, write_merge
from finetune.merge.sources import Sources, find_sources
from finetune.merge.tensors import MergedTensor, merged_pieces
from finetune.quantities import format_bytes
from finetune.replies.task_replies import Style
from finetune.run.environment import describe_environment
from finetune.terminal import Say, say
from qwenvl.checkpoint.checkpoint_files import StoredTensor
from qwenvl.checkpoint.identity import identity_to_json
from qwenvl.checkpoint.record import BaseNote, ModelRecord, write_record
from qwenvl.loading import DTYPES
from qwenvl.model.gptq_checkpoint import is_gptq_checkpoint
from qwenvl.model.whole import require_whole

COMPANION_BYTES = 50_000_000  # room for tokenizer, font and card


def merge(
    path: str | Path,
    to: str | Path,
    *,
    base: str | None = None,
    style: Style | None = None,
    dtype: str = "auto",
    onto: Literal["base", "dequantized"] | None = None,
    shard_bytes: float = SHARD_BYTES,
    check: bool = True,
    overwrite: bool = False,
    say: Say = say,
) -> Path:
    """Write the checkpoint that is base and adapter in one.

    Args:
        path: run or adapter folder.
        to: the folder to write; it appears complete or not at all.
        base: the adapter's base, where it is not where the adapter says: folder or hub id.
        style: "chat" or "base": what the adapter was trained on; None for what its record or its base says.
        dtype: "float32", "bfloat16", "float16", or "auto" for the types that the base is stored in.
        onto: after a training in 4 bits: merge into the weights that the training saw ("dequantized"), or into the
            base's own ("base"). None is as it was trained.
        shard_bytes: size of a weight file at most.
        check: read back what was written, load it in a fresh process, and compare its logits with base and adapter.
        overwrite: replace a folder that is there.
        say: prints a labelled line.

    Returns:
        `to`.

    Raises:
        InputError: something that was given does not fit; see the message.
        Failed: it could not be written, or the check found a fault. There is nothing new under `to` then.
    """
    to = Path(to)
    refuse_unwritable_folder(to, "the merged model", "--to")
    found = find_sources(Path(path), base, style)
    onto = onto or ("dequantized" if found.parts else "base")
    stored = require_whole(found.base)
    adapter = read_adapter(found.adapter, stored)
    plan = plan_tensors(stored, adapter, found, dtype, onto)
    dtypes = _dtypes(plan)
    made_of = {
        "base": identity_to_json(found.identity),
        "adapter": adapter.sha256(),
        "dtype": dtypes,
        "onto": onto,
        "chat_format": found.record.chat_format,
        "shard_bytes": int(shard_bytes),
    }
    say("base", f"{found.base} ({format_bytes(_bytes(stored.values()))}, fingerprint {found.identity.fingerprint})")
    kinds = ", ".join(f"{count} {kind}" for kind, count in adapter.kinds().items())
    say("adapter", f"{found.adapter} ({adapter.keys} tensors: {kinds})")
    sources = [found.adapter, Path(found.base), *([found.run] if found.run is not None else [])]
    if is_done(to, made_of, overwrite=overwrite, sources=sources):
        say("merged", f"{to} already holds this merge: nothing to do")
        return to
    notes = _notes(found, adapter, onto)
    for note in notes:
        say("note", note)
    say_links_left_out(found.base, say)
    needed = sum(tensor.planned.nbytes for tensor in plan)
    check_disk_space(to, needed + COMPANION_BYTES, "the merged folder")
    # Files that are read at the end: if one is damaged, better to know before gigabytes are written.
    config = read_config(found.base)
    read_generation_config(found.base)
    training = training_sections(found.run)
    prompt = None
    if check:
        prompt = prompt_of_base(found.base, visual=config.visual is not None)
    try:
        with writing_large_folder(to) as partial:
            hashes = _write(partial, plan, shard_bytes, say)
            _copy_companions(partial, found, plan)
            write_record(partial, _merged_record(found))
            facts = measure_rounding_to_4bit(plan, config, found.parts) if found.parts else {}
            if prompt is not None:
                facts |= check_merge(partial, plan, found, hashes, onto, prompt)
            else:
                facts["checked"] = "no (--no-check)"
            for name, fact in facts.items():
                say(name, fact)
            _write_card(partial, found, adapter, dtypes, facts, notes, training)
            hashes |= {
                file.name: file_hash(file)
                for file in sorted(partial.iterdir())
                if file.name not in hashes and file.name != CARD  # people write into that
            }
            about = {"base": found.base, "adapter_tensors": adapter.keys, "facts": facts}
            write_merge(partial, made_of, hashes, {**about, "versions": describe_environment()["versions"]})
    except InputError:
        raise
    except OSError as error:
        raise Failed(f"{to} could not be written: {error}. What was there before is as it was") from error
    say("merged", to)
    return to


def plan_tensors(
    stored: dict[str, StoredTensor], adapter: AdapterWeights, found: Sources, dtype: str, onto: str
) -> list[MergedTensor]:
    """Every tensor of the merged checkpoint, in the order of the base's files.

    Raises:
        UserError: an adapter that cannot be merged, or not as `onto` says.
    """
    if onto == "dequantized" and not found.parts:
        raise UserError("--onto dequantized is for adapters trained on a 4-bit base, which this one was not")
    if found.parts and any(change.low_rank and change.low_rank.init for change in adapter.changes.values()):
        raise UserError(f"{found.adapter}: it cannot be merged, as PiSSA and OLoRA change a 4-bit base for good")
    quantized = _quantized_names(found) if onto == "dequantized" else frozenset()
    return [
        MergedTensor(
            tensor,
            adapter.changes.get(name),
            DTYPES.get(dtype, tensor.dtype) if tensor.dtype.is_floating_point else tensor.dtype,
            found.trained_in or tensor.dtype,
            name in quantized,
        )
        for name, tensor in stored.items()
    ]


def _quantized_names(found: Sources) -> frozenset[str]:
    from qwenvl.model.quantization import quantized_names, require_bitsandbytes

    require_bitsandbytes()
    return quantized_names(read_config(found.base), found.parts)


def _dtypes(plan: list[MergedTensor]) -> str:
    """The floating-point types that are written, the one with the most bytes first."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in plan:
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.planned.nbytes
    ordered = sorted(sizes, key=sizes.__getitem__, reverse=True)
    return " ".join(str(dtype).removeprefix("torch.") for dtype in ordered)


def _bytes(tensors: Iterable[StoredTensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _notes(found: Sources, adapter: AdapterWeights, onto: str) -> list[str]:
    """Sentences that a user must read."""
    notes = []
    if not found.checked:
        named = adapter.config.get("base_model_name_or_path")
        notes.append(
            f"The adapter does not say which weights it was trained on (it names {named or 'no base'}): it was merged "
            f"into {found.base} unchecked."
        )
    asked = "in ChatML" if found.record.chat_format == "chatml" else "in raw text"
    notes.append(f"The merged model is asked {asked}: {found.record.read_from}.")
    if is_gptq_checkpoint(found.base, read_config(found.base)):
        notes.append(
            f"{found.base} is packed by GPTQ in 4 bits: the adapter is merged into the 16-bit weights that "
            "these stand for."
        )
    elif not found.checked and _names_gptq(adapter.config.get("base_model_name_or_path")):
        notes.append(
            f"By its name the base in training was in 4 bits (GPTQ), and {found.base} is not: the merged model "
            "computes nearly what was trained. To have exactly that, give the 4-bit checkpoint with --base."
        )
    if found.parts:
        seen = ", ".join(found.parts)
        into = (
            f"the weights as that training saw them ({seen} quantised and dequantised)"
            if onto == "dequantized"
            else f"the base's own weights, which the training saw in 4 bits ({seen})"
        )
        notes.append(f"Trained on a 4-bit base (Q-LoRA), merged into {into}.")
    if any(change.low_rank and change.low_rank.init for change in adapter.changes.values()):
        notes.append(
            f"Initialised by {adapter.config['init_lora_weights']}: what that took out of the base is computed again, "
            "which takes a while for large layers."
        )
    return notes


def _names_gptq(base: str | None) -> bool:
    """By the names that such checkpoints have: Qwen-VL-Chat-Int4, or ...-GPTQ."""
    return base is not None and any(mark in Path(base).name.lower() for mark in ("int4", "gptq"))


def _write(folder: Path, plan: list[MergedTensor], shard_bytes: float, say: Say) -> dict[str, str]:
    planned = [tensor.planned for tensor in plan]
    with byte_progress("merging", sum(each.nbytes for each in planned)) as progress:
        hashes = write_tensors(folder, planned, merged_pieces(plan), shard_bytes, progress)
        say("written", f"{progress.rate()}; peak memory {format_bytes(_peak_memory())}")
    return hashes


def _peak_memory() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _copy_companions(folder: Path, found: Sources, plan: list[MergedTensor]) -> None:
    config = read_json(companion_folder(found.base) / CONFIG)
    dtype = getattr(torch, _dtypes(plan).split()[0])
    copy_companions(
        found.base,
        folder,
        config=dtype_settings(config, dtype),
        generation=chat_settings(found.base, found.record.chat_format),
    )


def _merged_record(found: Sources) -> ModelRecord:
    """The adapter's, of a model that has no 4-bit parts now."""
    note = BaseNote(found.base, found.identity)
    return replace(found.record, base=note, quantize=(), own_weights=None)


def _write_card(
    folder: Path,
    found: Sources,
    adapter: AdapterWeights,
    dtypes: str,
    facts: dict[str, str],
    notes: list[str],
    training: list[str],
) -> None:
    shown = {"adapter": ", ".join(f"{count} tensors {kind}" for kind, count in adapter.kinds().items())}
    write_card(
        folder,
        title=found.run.name if found.run is not None else found.adapter.name,
        base=found.base,
        fingerprint=found.identity.fingerprint,
        facts=shown | {"weights": dtypes, **facts},
        notes=notes,
        training=training,
        tags=["lora", "merged"],
    )
