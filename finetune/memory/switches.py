"""The choices of a run that decide its memory and speed, settled: what the plan counts by."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.model.recomputation import Checkpointing, checkpoint_blocks
from finetune.recipe import Train


@dataclass(frozen=True)
class Switches:
    """Checkpointing, optimizer and what else there is to choose, none of them `auto`.

    Attributes:
        attention: varlen, sdpa, eager or flash_attention_2.
        kernels: torch or liger.
        checkpointing: see `checkpointing`.
        optim: a name of TRL's `optim`.
        vision_cache: off, memory or disk.
        reasons: what was settled by the plan, in words; nothing where the recipe says it all.
        device_type: cuda or cpu: where the run is.
    """

    attention: str
    kernels: str
    checkpointing: Checkpointing
    optim: str
    vision_cache: str
    reasons: tuple[str, ...] = ()
    device_type: str = "cuda"

    @property
    def train_arguments(self) -> dict[str, Any]:
        """What of TRL's `SFTConfig` follows from them."""
        return {"optim": self.optim}

    def prepare(self, model: nn.Module, train: Train):
        """Set the checkpointing of a model's layers, where our key says it; TRL's keys are TRL's to follow."""
        if train.checkpointing is not None:
            checkpoint_blocks(model, self.checkpointing)
