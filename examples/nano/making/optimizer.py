"""Muon for the hidden matrices and AdamW for the rest, as one optimizer."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from examples.nano.making.muon import Muon
from finetune.model.components import component_of

OUTSIDE_MUON = ("wte", "lm_head", "conv1", "positional_embedding", "query", "head")
"""Name parts of matrices that AdamW trains: embeddings, and input and output layers. Muon is for hidden layers."""


class MuonAndAdamW(torch.optim.Optimizer):
    """Both optimizers behind the interface of one, as a trainer needs it.

    Args:
        named: parameters to train.
        rate: learning rate of both; Muon's updates are scaled to the size of AdamW's.
        rates: component of the model -> learning rate of its own, or None.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], rate: float, rates: Mapping[str, float | None] | None = None
    ) -> None:
        hidden: dict[float, list[nn.Parameter]] = defaultdict(list)
        rest: dict[float, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in named:
            inside = parameter.ndim == 2 and not any(part in name for part in OUTSIDE_MUON)
            own = (rates or {}).get(component_of(name)) or rate
            (hidden if inside else rest)[own].append(parameter)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(_groups(rest), betas=(0.9, 0.98), weight_decay=0.0)
        ]
        if hidden:
            self.parts.append(Muon(_groups(hidden), lr=rate, weight_decay=0.02))
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        """The parts' parameter groups themselves, so that a scheduler that sets a rate here sets theirs."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures: the trainers give none
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
