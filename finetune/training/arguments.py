"""The trainer's configuration: what recipes say, and what none does as it follows from how we train."""

from math import ceil
from typing import Any

import torch
from trl import SFTConfig


def sft_config(given: dict[str, Any], *, output: str, seed: int) -> SFTConfig:
    """TRL's configuration of a run.

    Args:
        given: fields of it, from the recipe and what follows from that.
        output: the run folder.
        seed: of everything random.
    """
    return SFTConfig(
        **given,
        output_dir=output,
        seed=seed,
        data_seed=seed,
        bf16=False,
        fp16=False,
        use_cpu=not torch.cuda.is_available(),
        max_length=None,
        packing=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        label_names=["labels"],
        average_tokens_across_devices=True,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
    )


LEAST_AHEAD = 2
"""Batches a worker has ready, at least: PyTorch's own default."""


def loader_settings(workers: int, gradient_accumulation_steps: int) -> dict[str, Any]:
    """`SFTConfig`'s settings of the data loaders.

    Images travel as uint8, 0.6 MB each at 448 x 448, and are normalised on the device.

    Args:
        workers: processes that make batches; with none, nothing is made ahead.
        gradient_accumulation_steps: batches of an optimizer step; all of the next one are being made meanwhile.
    """
    settings: dict[str, Any] = {"dataloader_num_workers": workers, "dataloader_pin_memory": torch.cuda.is_available()}
    if workers:
        settings["dataloader_prefetch_factor"] = max(LEAST_AHEAD, ceil(gradient_accumulation_steps / workers))
        # Otherwise every epoch and every evaluation waits for processes to start and the first batches to be made.
        settings["dataloader_persistent_workers"] = True
    return settings
