"""The model of a checkpoint of a run that trains in full, as a folder that any program loads.

Its weights are whole, or in the parts that the processes wrote; they are read and written tensor by tensor.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from finetune.errors import Failed, InputError, UserError
from finetune.files.atomic_writes import writing_large_folder
from finetune.files.byte_progress import byte_progress
from finetune.files.checkpoint_folder import (
    CONFIG,
    GENERATION_CONFIG,
    complete_trained_folder,
    copy_file,
    read_json,
    say_links_left_out,
)
from finetune.files.disk_space import check_disk_space
from finetune.files.shards import MODEL, SHARDS, read_stored, stored_forms
from finetune.files.tensor_files import SHARD_BYTES, Planned, write_tensors
from finetune.quantities import format_bytes
from finetune.terminal import Say, say
from qwenvl.checkpoint.checkpoint_files import locate_tensors
from qwenvl.checkpoint.record import read_record, write_record
from qwenvl.loading import DTYPES, find_source
from qwenvl.model.whole import require_whole
from qwenvl.processor import QwenVLProcessor

COMPANION_BYTES = 50_000_000  # room for tokenizer and font


def write_model(
    checkpoint: Path,
    to: str | Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    shard_bytes: float = SHARD_BYTES,
    overwrite: bool = False,
    say: Say = say,
) -> Path:
    """Write the model folder of a checkpoint, as a run writes its result.

    Args:
        checkpoint: `checkpoints/step-N` of a run, verified.
        to: the folder to write; it appears complete or not at all.
        base: where the checkpoint that was trained is, if not where the record says: for the files beside weights.
        dtype: "float32", "bfloat16", "float16", or "auto" for that of the run's result.
        shard_bytes: size of a weight file at most.
        overwrite: replace a folder that is there.

    Returns:
        `to`.

    Raises:
        InputError: something that was given does not fit.
        Failed: it could not be written; there is nothing new under `to` then.
    """
    to = Path(to)
    if to.exists() and any(to.iterdir()) and not overwrite:
        raise UserError(f"--to {to} is not empty: give another folder, or --overwrite to replace it")
    record = read_record(checkpoint)
    if record is None or record.base is None:
        raise UserError(f"{checkpoint} does not say what it was trained as: restore its qwenvl.json")
    base = find_source(base or record.base.path).base
    forms, read = _weights(checkpoint)
    wanted = DTYPES.get(dtype) or _dtype_of_result(checkpoint)
    plan = [
        Planned(name, shape, wanted if wanted is not None and kind.is_floating_point else kind)
        for name, (shape, kind) in forms.items()
    ]
    needed = sum(planned.nbytes for planned in plan)
    say("checkpoint", f"{checkpoint}: {len(plan)} tensors, {format_bytes(needed)} as they are written")
    say_links_left_out(base, say)
    check_disk_space(to, needed + COMPANION_BYTES, "the model")
    try:
        with writing_large_folder(to) as partial:
            with byte_progress("writing", needed) as progress:
                tensors: Iterator[tuple[str, torch.Tensor]] = (
                    (planned.name, read(planned.name).to(planned.dtype)) for planned in plan
                )
                write_tensors(partial, plan, tensors, shard_bytes, progress)
            for name in (CONFIG, GENERATION_CONFIG):
                if (checkpoint / name).is_file():
                    copy_file(checkpoint / name, partial / name)
            QwenVLProcessor.from_pretrained(base).save_pretrained(partial)
            most = max({planned.dtype for planned in plan}, key=[planned.dtype for planned in plan].count)
            complete_trained_folder(partial, base, most)
            write_record(partial, record)
            require_whole(partial)
    except InputError:
        raise
    except OSError as error:
        raise Failed(f"{to} could not be written: {error}. What was there before is as it was") from error
    say("model", to)
    return to


def _weights(
    checkpoint: Path,
) -> tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], Callable[[str], torch.Tensor]]:
    """Shape and type of each tensor by name, and what reads one."""
    if not (checkpoint / SHARDS).is_dir():
        stored = locate_tensors(checkpoint)
        return {name: (tuple(one.shape), one.dtype) for name, one in stored.items()}, lambda name: stored[name].read()
    forms = {
        name.removeprefix(MODEL): (tuple(form.size), form.properties.dtype)
        for name, form in stored_forms(checkpoint).items()
        if name.startswith(MODEL)
    }

    def read(name: str) -> torch.Tensor:
        shape, dtype = forms[name]
        into = torch.empty(shape, dtype=dtype)
        read_stored(checkpoint, {f"{MODEL}{name}": into}, alone=True)
        return into

    return forms, read


def _dtype_of_result(checkpoint: Path) -> torch.dtype | None:
    """The type that the run's result has, which its configuration says, whatever its masters are; None where it says
    nothing."""
    config = read_json(checkpoint / CONFIG)
    return DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")))
