"""The settled choices that decide a run's memory and speed."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.model.recomputation import Recomputation, set_recomputation
from finetune.recipe import Train


@dataclass(frozen=True)
class Switches:
    """What a run computes with; every `auto` is resolved.

    Attributes:
        attention: varlen, sdpa, eager or flash_attention_2.
        kernels: torch or liger.
        checkpointing: see `finetune.model.recomputation`.
        optim: a value of TRL's `optim`.
        vision_cache: off, memory or disk.
        reasons: what the plan settled and why, in words; empty if the recipe leaves nothing open.
        device_type: cuda or cpu, where the run computes.
    """

    attention: str
    kernels: str
    checkpointing: Recomputation
    optim: str
    vision_cache: str
    reasons: tuple[str, ...] = ()
    device_type: str = "cuda"

    @property
    def train_arguments(self) -> dict[str, Any]:
        """The fields of TRL's `SFTConfig` that follow from them."""
        return {"optim": self.optim}

    def prepare(self, model: nn.Module, train: Train) -> None:
        """Set the recomputation of a model's layers if the recipe has our key; the trainer follows TRL's keys."""
        if train.checkpointing is not None:
            set_recomputation(model, self.checkpointing)
