"""The loss of one forward: the trainer's, and the memory plan's on the meta device."""

from typing import Any

import torch
from torch import nn

from finetune.batches.images import image_arguments
from finetune.model.adapters import TrainableModel, without_adapter


def forward_with_loss(
    model: nn.Module, unwrapped: TrainableModel, batch: dict[str, torch.Tensor], items: int | torch.Tensor | None
) -> Any:
    """Run the model on a batch; the output's `loss` is over all supervised tokens of the batch.

    Logits are computed at supervised positions only, in chunks that are not kept.

    Args:
        model: called; DistributedDataParallel and the like may be around it.
        unwrapped: the same model without these wrappers.
        batch: as the collator makes it, on the model's device.
        items: divides the sum of cross-entropies; None takes the mean.

    Returns:
        The model's output (`CausalLMOutputWithPast`).
    """
    return model(
        input_ids=batch["input_ids"],
        sequence_lengths=batch["sequence_lengths"].tolist(),
        **image_arguments(without_adapter(unwrapped), batch),
        labels=batch["labels"],
        num_items_in_batch=items,
        skip_logits=True,
        use_cache=False,
    )
