"""The loss of one forward: the trainer's, and the memory plan's, which runs it on shapes alone."""

from typing import Any

import torch
from torch import nn

from finetune.batches.images import image_arguments


def forward_with_loss(
    model: nn.Module, unwrapped: nn.Module, batch: dict[str, torch.Tensor], items: int | torch.Tensor | None
) -> Any:
    """Run the model on a batch; the output's `loss` is over all supervised tokens of the batch.

    Logits are computed at the supervised positions only, a few at a time, and not kept.

    Args:
        model: with the wrapper that a step of several processes needs, if any.
        unwrapped: the same without it.
        batch: as the collator makes it, on the model's device.
        items: what the sum of cross-entropies is divided by; None takes the mean.
    """
    return model(
        input_ids=batch["input_ids"],
        sequence_lengths=batch["sequence_lengths"].tolist(),
        **image_arguments(unwrapped, batch),
        labels=batch["labels"],
        num_items_in_batch=items,
        skip_logits=True,
        use_cache=False,
    )
