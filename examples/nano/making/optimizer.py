"""Muon for the hidden matrices and AdamW for the rest, and the steps of a warm start with them."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.nano.making.muon import Muon
from finetune.model.components import component_of

WARM_UP = 100  # steps
LAST = 0.02  # of the learning rate, at the end
OUTSIDE_MUON = ("wte", "lm_head", "conv1", "positional_embedding", "query", "head")
"""Matrices that are tables of rows or face the data, by a part of their names: Muon is for those between."""


class MuonAndAdamW(torch.optim.Optimizer):
    """Both optimizers as one, for a trainer that takes one.

    Args:
        named: parameters to train.
        rate: learning rate of both: Muon's updates are scaled to the size of AdamW's.
        rates: of single components of the model, in its place.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], rate: float, rates: Mapping[str, float | None] | None = None
    ):
        hidden, rest = defaultdict(list), defaultdict(list)
        for name, parameter in named:
            inside = parameter.ndim == 2 and not any(part in name for part in OUTSIDE_MUON)
            own = (rates or {}).get(component_of(name)) or rate
            (hidden if inside else rest)[own].append(parameter)
        self.parts = [torch.optim.AdamW(_groups(rest), betas=(0.9, 0.98), weight_decay=0.0)]
        if hidden:
            self.parts.append(Muon(_groups(hidden), lr=rate, weight_decay=0.02))
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        """The parts' own: a rate that is set here is theirs."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()  # loading makes new ones


def _groups(by_rate: Mapping[float, list[nn.Parameter]]) -> list[dict[str, Any]]:
    return [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]


class WarmStart:
    """One step after the other of a warm start: clipped gradients, a cosine over `steps`."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], rate: float, steps: int):
        self.optimizer = MuonAndAdamW(named, rate)
        self.rate, self.steps = rate, steps

    def step(self, number: int) -> None:
        """Update the parameters with their gradients, clipped to a norm of 1, as step `number` (from 0)."""
        share = min(1.0, number / self.steps)
        factor = min(1.0, (number + 1) / WARM_UP) * (LAST + (1 - LAST) * (1 + math.cos(math.pi * share)) / 2)
        groups = self.optimizer.param_groups
        torch.nn.utils.clip_grad_norm_([parameter for group in groups for parameter in group["params"]], 1.0)
        for group in groups:
            group["lr"] = self.rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state so that a kill leaves the one before it."""
    partial = path.with_name(path.name + ".partial")
    torch.save(dict(state), partial)
    partial.replace(path)
