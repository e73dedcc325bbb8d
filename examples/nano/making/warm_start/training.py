"""The steps of a warm start and its state on disk."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.nano.making.optimizer import MuonAndAdamW

WARM_UP = 100  # steps
LAST = 0.02  # of the learning rate, at the end


class WarmStart:
    """Optimizer steps with clipped gradients and a cosine schedule.

    Args:
        named: parameters to train.
        rate: peak learning rate.
        steps: number of optimizer steps.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], rate: float, steps: int) -> None:
        self.optimizer = MuonAndAdamW(named, rate)
        self.rate, self.steps = rate, steps

    def step(self, number: int) -> None:
        """Take step `number`, counted from 0, with gradients clipped to a norm of 1."""
        share = min(1.0, number / self.steps)
        factor = min(1.0, (number + 1) / WARM_UP) * (LAST + (1 - LAST) * (1 + math.cos(math.pi * share)) / 2)
        groups = self.optimizer.param_groups
        torch.nn.utils.clip_grad_norm_([parameter for group in groups for parameter in group["params"]], 1.0)
        for group in groups:
            group["lr"] = self.rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state; if the process is killed meanwhile, the previous state is kept."""
    partial = path.with_name(path.name + ".partial")
    torch.save(dict(state), partial)
    partial.replace(path)
