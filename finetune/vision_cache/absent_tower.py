"""The vision side of a model whose images were all encoded before: gone, and its memory free."""

import gc

import torch
from torch import nn

from finetune.errors import Failed
from qwenvl import QwenVLForConditionalGeneration


class AbsentTower(nn.Module):
    """Stands where the vision transformer and resampler were."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Raises:
        Failed: always.
        """
        raise Failed(
            f"{len(pixels)} image(s) would have to be encoded, but the vision side has left the model: this run's "
            "images were all encoded before it trained. Set data.vision_cache: off to keep it"
        )


def let_tower_go(model: QwenVLForConditionalGeneration):
    """Take the vision transformer and resampler out of a model, for good; adapters can still be saved."""
    model.transformer.visual = AbsentTower()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
