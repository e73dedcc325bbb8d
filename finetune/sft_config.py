"""The trainer's configuration: what recipes say, and what none does as it follows from how we train."""

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
