"""The published settings on our model: what the published fine-tuning script does, with our trainer around it.

The script (`finetune.py` of the published project with `finetune_lora_single_gpu.sh`) pads every conversation to
`model_max_length`, one a batch and 8 batches a step; runs the vision tower on every image of every step; computes
attention without fused kernels, and logits for all positions, padding too, which its loss widens to float32; keeps
of each layer only the input (gradient checkpointing); and steps PyTorch's AdamW. Q-LoRA holds the language model's
linears in 4 bits, and nothing else.

Different from it, in favour of neither: 4-bit weights are NF4 and not GPTQ's, and the loss is divided by the
supervised tokens of the step and not of each batch, so that both settings have the same gradients.
"""

from typing import Any

from torch import nn

from finetune.memory.switches import Switches
from finetune.recipe import Recipe
from finetune.training.trainer import QwenVLTrainer
from qwenvl.text.chat import IGNORED


def published_recipe(recipe: Recipe) -> Recipe:
    """The recipe with all that decides on memory and speed as published; what is trained, and on what, stays."""
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
"""Of `SFTConfig`."""

PUBLISHED_SWITCHES = Switches(
    attention="eager", kernels="torch", checkpointing="full", optim="adamw_torch", vision_cache="off"
)


class PublishedTrainer(QwenVLTrainer):
    """The trainer with the published loss. Its batches are those of `workload.PaddedCollator`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy summed over the supervised tokens, of float32 logits at every position."""
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=inputs.get("pixel_values"),
            use_cache=False,
        )
        logits = outputs.logits[:, :-1].contiguous()
        targets = inputs["labels"][:, 1:].contiguous()
        # Under autocast, as the script runs, cross-entropy is given a copy in float32.
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        loss = total / ((targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss
