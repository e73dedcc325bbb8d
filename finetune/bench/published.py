"""The published settings on our model: what the published fine-tuning script does, with our trainer around it.

The script (`finetune.py` of the published project with `finetune_lora_single_gpu.sh`) pads every conversation to
`model_max_length` and accumulates 8 batches of one; runs the vision tower on every image of every step; computes
attention without fused kernels; computes logits for all positions, padding included, and casts them to float32 for the
loss; uses gradient checkpointing and PyTorch's AdamW. Q-LoRA has only the language model's linears in 4 bits.

Two differences favour neither side: 4-bit weights are NF4 instead of GPTQ, and the loss is divided by the supervised
tokens of the step instead of each batch, so that both settings have the same gradients.
"""

from typing import Any

import torch
from torch import nn

from finetune.memory.switches import Switches
from finetune.recipe import Recipe
from finetune.training.trainer import QwenVLTrainer
from qwenvl.text.chat import IGNORED


def published_recipe(recipe: Recipe) -> Recipe:
    """The recipe with all settings that decide memory and speed as published; what is trained on which data stays."""
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(
                update={
                    "attention": "eager",
                    "kernels": "torch",
                    "quantize": ("language",),
                    "embeddings_on_cpu": False,
                }
            ),
            "data": recipe.data.model_copy(update={"packing": False, "tokens_per_batch": None, "vision_cache": "off"}),
            "train": recipe.train.model_copy(update={"checkpointing": None}),
        }
    )


PUBLISHED_ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": None,
    "activation_offloading": False,
}
"""Fields of `SFTConfig`."""

PUBLISHED_SWITCHES = Switches(
    attention="eager", kernels="torch", checkpointing="full", optim="adamw_torch", vision_cache="off"
)


class PublishedTrainer(QwenVLTrainer):
    """The trainer with the published loss. Its batches are those of `workload.PaddedCollator`."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy summed over the supervised tokens, from float32 logits of every position."""
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=inputs.get("pixel_values"),
            use_cache=False,
        )
        logits = outputs.logits[:, :-1].contiguous()
        targets = inputs["labels"][:, 1:].contiguous()
        # The script runs under autocast, which casts the logits to float32 for cross-entropy.
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        loss = total / ((targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss
