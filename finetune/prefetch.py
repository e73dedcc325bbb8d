"""How far batches are made ahead of the step that needs them, so that a slow disk does not hold it up."""

from math import ceil
from typing import Any

import torch

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
