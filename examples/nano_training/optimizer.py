"""Muon for the hidden matrices and AdamW for the rest, with one schedule; and checkpoints of both."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

WARM_UP = 100  # steps
LAST = 0.02  # of the learning rate, at the end
OUTSIDE_MUON = ("wte", "lm_head", "conv1", "positional_embedding", "query", "head")
"""Matrices that are tables of rows or face the data, by a part of their names: Muon is for those between."""


class MuonAndAdamW:
    """Both optimizers as one, on a cosine over `steps`.

    Args:
        named: parameters to train.
        rate: highest learning rate, of both: Muon's updates are scaled to the size of AdamW's.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], rate: float, steps: int):
        hidden, rest = [], []
        for name, parameter in named:
            inside = parameter.ndim == 2 and not any(part in name for part in OUTSIDE_MUON)
            (hidden if inside else rest).append(parameter)
        self.rate, self.steps, self.parameters = rate, steps, hidden + rest
        self.optimizers = [torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]
        if hidden:
            self.optimizers.append(
                torch.optim.Muon(hidden, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
            )

    def step(self, number: int) -> None:
        """Update the parameters with their gradients, clipped to a norm of 1, as step `number` (from 0)."""
        share = min(1.0, number / self.steps)
        factor = min(1.0, (number + 1) / WARM_UP) * (LAST + (1 - LAST) * (1 + math.cos(math.pi * share)) / 2)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def autocast() -> torch.autocast:
    """Matrix products in bfloat16, which a CPU that has it does four times as fast; weights stay float32.

    Without autocast's cache: it keeps the bfloat16 copies of weights until the context ends, and a whole training
    within one would go on with those of its first step.
    """
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state so that a kill leaves the one before it."""
    partial = path.with_name(path.name + ".partial")
    torch.save(dict(state), partial)
    partial.replace(path)
