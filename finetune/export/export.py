"""A checkpoint in another form, step by step: find it, write, read back, compare, upload.

Tensors are read and written one after the other, in pieces: memory stays at a few hundred megabytes however large the
model.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from finetune.errors import UserError
from finetune.export.folder import FORMATS, default_folder, refuse_existing, writing_errors
from finetune.export.model_card import training_sections, write_card
from finetune.export.tensors import (
    ExportedTensor,
    check_written,
    dtype_name,
    pieces,
    planned,
    written_dtype,
)
from finetune.files.atomic_writes import writing_large_folder
from finetune.files.base_identity import identify
from finetune.files.byte_progress import byte_progress
from finetune.files.checkpoint_folder import (
    CARD,
    CONFIG,
    chat_settings,
    companion_folder,
    copy_companions,
    copy_file,
    dtype_settings,
    own_card,
    read_config,
    read_generation_config,
    read_json,
    read_tokenizer,
    say_links_left_out,
)
from finetune.files.disk_space import check_disk_space
from finetune.files.tensor_files import SHARD_BYTES, SINGLE_NAME, write_tensors
from finetune.quantities import format_bytes
from finetune.terminal import Say, say
from qwenvl import QwenVLConfig
from qwenvl.checkpoint.checkpoint_files import StoredTensor
from qwenvl.checkpoint.record import BaseNote, trained_as, write_record
from qwenvl.loading import DTYPES, find_adapter, find_source
from qwenvl.model.gptq_checkpoint import is_gptq_checkpoint
from qwenvl.model.quantization import quantized_parts
from qwenvl.model.whole import require_whole

COMPANION_BYTES = 60_000_000  # room for tokenizers, font and card


def export(
    model: str,
    to: str,
    *,
    out: str | Path | None = None,
    shard_bytes: float | None = None,
    dtype: str = "auto",
    quantize: Sequence[str] | None = None,
    type: str | None = None,
    push: str | None = None,
    public: bool = False,
    say: Say = say,
) -> Path:
    """Write a checkpoint in another form; the folder appears complete or not at all.

    Args:
        model: checkpoint or merged folder, hub id, or the run folder of a training without adapter.
        to: "safetensors" (the same model in safetensors files), "nf4" (in 4 bits), "qwen2" (the language model as
            Transformers' Qwen2, vision beside it), or "gguf" (the language model for llama.cpp, vision beside it).
        out: the folder; None for MODEL-FORMAT beside the model.
        shard_bytes: size of a weight file at most; None for 5 GB.
        dtype: "float32", "bfloat16", "float16", or "auto" for the types that the weights are stored in.
        quantize: with "nf4", the parts in 4 bits (see `model.quantization.PARTS`); None for the language model's.
        type: with "gguf", what its matrices are in (`gguf_types.TYPES`); None for f16.
        push: `owner/name` on the hub, to upload the finished folder to.
        public: let everybody see it there.
        say: prints a labelled line.

    Returns:
        The folder.

    Raises:
        InputError: something that was given does not fit; see the message.
        Failed: it could not be written, or what was read back is not what was written. There is no folder then.
    """
    if to not in FORMATS:
        raise UserError(f"--to must be one of {', '.join(FORMATS)}, not {to!r}")
    folder = default_folder(model, to) if out is None else Path(out)
    refuse_existing(folder)
    base = _checkpoint(model)
    say_links_left_out(base, say)
    read_generation_config(base)  # which is copied as it is, or read: refused where it is damaged
    if push is not None:
        from finetune.export.push import refuse_push

        refuse_push(push, public=public)
    elif public:
        raise UserError("--public says who may see an upload: give --push too")
    if quantize is not None and to != "nf4":
        raise UserError(f"--quantize has no effect with --to {to}: leave it out")
    if type is not None and to != "gguf":
        raise UserError(f"--type has no effect with --to {to}: leave it out")
    if shard_bytes is not None and to in ("nf4", "gguf"):
        raise UserError(f"--shard-size has no effect with --to {to}: leave it out")
    if to == "gguf":
        if dtype != "auto":
            raise UserError("--dtype has no effect with --to gguf: leave it out, and give --type")
        _write_gguf(base, folder, type or "f16", _run(model), say)
        say("exported", folder)
    elif to == "nf4":
        from finetune.export.nf4 import export_nf4
        from qwenvl.model.quantization import DEFAULT_PARTS

        parts = DEFAULT_PARTS if quantize is None else quantize
        export_nf4(base, folder, quantize=parts, dtype=None if dtype == "auto" else dtype, say=say)
    else:
        write = _write_safetensors if to == "safetensors" else _write_qwen2
        write(base, folder, shard_bytes or SHARD_BYTES, DTYPES.get(dtype), _run(model), say)
        say("exported", folder)
    if push is not None:
        from finetune.export.push import push as upload

        upload(folder, push, public=public, say=say)
    return folder


def _run(model: str) -> Path | None:
    """The run folder that a model is given by."""
    return Path(model) if (Path(model) / "run.json").is_file() else None


def _checkpoint(model: str) -> str:
    """The checkpoint that a path stands for: folder or hub id.

    Raises:
        UserError: an adapter.
        InputError: there is no such model.
    """
    if find_adapter(model) is not None:
        merged = f"{str(model).rstrip('/')}-merged"
        raise UserError(
            f"{model} is an adapter: merge it first, then export the merged folder:\n"
            f"    finetune merge {model} --to {merged}\n"
            "with --base BASE where its base is not where the adapter says"
        )
    return find_source(model).base


def _locate(base: str, config: QwenVLConfig, say: Say) -> dict[str, StoredTensor]:
    """The tensors of a complete checkpoint in 16 or 32 bits.

    Raises:
        InputError: it is not complete, damaged, or in 4 bits.
    """
    parts = quantized_parts(config, base)
    if parts:
        raise UserError(
            f"{base} is in 4 bits already ({', '.join(parts)}), and those are safetensors files: give the checkpoint "
            "that it was made from"
        )
    stored = require_whole(base, config)
    size = format_bytes(sum(tensor.nbytes for tensor in stored.values()))
    packed = ", unpacked from GPTQ's 4 bits" if is_gptq_checkpoint(base, config) else ""
    record = trained_as(base)
    asked = "" if record.style is None else f", a {record.style} model ({record.read_from})"
    say("source", f"{base} ({size}{packed}){asked}")
    return stored


def _write_safetensors(
    base: str, folder: Path, shard_bytes: float, dtype: torch.dtype | None, run: Path | None, say: Say
) -> None:
    stored = _locate(base, read_config(base), say)
    training = training_sections(run)
    tensors = [ExportedTensor(name, tensor, written_dtype(tensor, dtype)) for name, tensor in stored.items()]
    needed = sum(tensor.planned.nbytes for tensor in tensors)
    check_disk_space(folder, needed + COMPANION_BYTES, "the exported folder")
    identity = identify(base)
    with writing_errors(folder), writing_large_folder(folder) as partial:
        with byte_progress("writing", needed) as progress:
            hashes = write_tensors(partial, planned(tensors), pieces(tensors), shard_bytes, progress)
            say("written", progress.rate())
        published, record = read_json(companion_folder(base) / CONFIG), trained_as(base)
        written_as = _main_dtype(tensors)
        as_stored = dtype is None and not is_gptq_checkpoint(base, read_config(base))
        copy_companions(
            base,
            partial,
            config=None if as_stored else dtype_settings(published, written_as),
            generation=chat_settings(base, record.chat_format),
        )
        write_record(partial, replace(record, base=BaseNote(base, identity), own_weights=None))
        source_card = own_card(companion_folder(base))
        if source_card is not None:  # it is the same model, and so is its card
            copy_file(source_card, partial / CARD)
        else:
            facts = {"weights": dtype_name(written_as)}
            title = _name(run or Path(base))
            known = identity.fingerprint
            write_card(partial, title=title, base=base, fingerprint=known, facts=facts, training=training)
        lossless = all(_holds(tensor.dtype, tensor.source.dtype) for tensor in tensors)
        _read_back(partial, hashes, tensors, needed, say, identity.fingerprint if lossless else None)


def _write_qwen2(
    base: str, folder: Path, shard_bytes: float, dtype: torch.dtype | None, run: Path | None, say: Say
) -> None:
    from finetune.export.qwen2 import (
        VISUAL,
        VISUAL_WEIGHTS,
        check_folder,
        limits,
        plan_language,
        plan_visual,
        write_companions,
        write_qwen2_card,
    )

    config = read_config(base)
    stored = _locate(base, config, say)
    tokenizer, training = read_tokenizer(base), training_sections(run)
    language, visual = plan_language(config, stored, dtype), plan_visual(config, stored, dtype)
    unknown = sorted(stored.keys() - {tensor.source.name for tensor in (*language, *visual)})
    if unknown:
        say("note", f"left out, as no part of the model: {', '.join(unknown[:3])} ({len(unknown)} tensors)")
    needed = sum(tensor.planned.nbytes for tensor in (*language, *visual))
    check_disk_space(folder, needed + COMPANION_BYTES, "the exported folder")
    identity = identify(base)
    with writing_errors(folder), writing_large_folder(folder) as partial:
        with byte_progress("writing", needed) as progress:
            hashes = write_tensors(partial, planned(language), pieces(language), shard_bytes, progress)
            if visual:
                (partial / VISUAL).mkdir()
                whole = write_tensors(partial / VISUAL, planned(visual), pieces(visual), math.inf, progress)
                (partial / VISUAL / SINGLE_NAME).rename(partial / VISUAL / VISUAL_WEIGHTS)
                hashes[f"{VISUAL}/{VISUAL_WEIGHTS}"] = whole[SINGLE_NAME]
            say("written", progress.rate())
        written_as = _main_dtype(language)
        write_companions(partial, base, tokenizer, config, written_as)
        write_record(partial, replace(trained_as(base), base=BaseNote(base, identity), own_weights=None))
        _read_back(partial, hashes, [*language, *visual], needed, say)
        check_folder(partial, tokenizer)
        facts = {"weights": dtype_name(written_as), "context": f"{config.seq_length:,} tokens"}
        title = f"{_name(run or Path(base))}, language model as Qwen2"
        write_qwen2_card(
            partial, base, config, title=title, fingerprint=identity.fingerprint, facts=facts, training=training
        )
    for line in limits(config):
        say("note", line)


def _write_gguf(base: str, folder: Path, kind: str, run: Path | None, say: Say) -> None:
    from finetune.export.gguf import default_threads, export_gguf, prepare_gguf
    from finetune.export.gguf_types import TYPES

    if kind not in TYPES:
        raise UserError(f"--type must be one of {', '.join(TYPES)}, not {kind!r}")
    config = read_config(base)
    prepare_gguf(config, base)
    stored = _locate(base, config, say)
    title = _name(run or Path(base))
    export_gguf(base, stored, folder, kind=kind, run=run, title=title, threads=default_threads(), say=say)


def _read_back(
    folder: Path,
    hashes: dict[str, str],
    tensors: list[ExportedTensor],
    total: int,
    say: Say,
    fingerprint: str | None = None,
) -> None:
    with byte_progress("reading back", total) as progress:
        check_written(folder, hashes, tensors, progress, fingerprint)
        what = "every byte as written" if fingerprint is None else "every value as in the source"
        say("read back", f"{progress.rate()}: {what}, names and shapes as planned")


def _holds(written: torch.dtype, stored: torch.dtype) -> bool:
    """Whether one type has all values of another; bfloat16 and float16 have not each other's."""
    return torch.promote_types(written, stored) == written


def _name(path: Path) -> str:
    """Of a folder, or a hub id without its owner."""
    return path.resolve().name if path.exists() else path.name


def _main_dtype(tensors: list[ExportedTensor]) -> torch.dtype:
    """The floating-point type with the most bytes."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.planned.nbytes
    return max(sizes, key=sizes.__getitem__)
