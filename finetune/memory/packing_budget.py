"""How many tokens one forward may have: as the recipe says or, with `auto`, as many as there is memory for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from finetune.data.checking import Checked
from finetune.memory.free_memory import device_type, free_device_memory
from finetune.recipe import Data, Recipe
from qwenvl import QwenVLConfig

NOTES = "out_of_memory"
"""Entry of run.json: the budgets that were lowered, and from which step on."""


@dataclass(frozen=True)
class ChosenBudget:
    """Tokens of one forward.

    Attributes:
        tokens: None where every conversation has a forward of its own.
        reason: in words, where `auto` chose it; else empty.
        lowered: of a resumed run, what was noted of packs that did not fit (see `out_of_memory.PackBudget`).
    """

    tokens: int | None
    reason: str = ""
    lowered: tuple[Mapping[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"up to {self.tokens:,} tokens in one forward: {self.reason}"

    def of_all_processes(self, device: torch.device) -> "ChosenBudget":
        """The lowest of those that the processes of a run have chosen, each by its own GPU; all call it together."""
        if self.tokens is None or not (dist.is_available() and dist.is_initialized()):
            return self
        lowest = torch.tensor(self.tokens, device=device)
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        return replace(self, tokens=int(lowest))


def choose_budget(
    recipe: Recipe, config: QwenVLConfig, checked: Checked, stored: Mapping[str, Any] | None = None
) -> ChosenBudget:
    """The budget of a run; to be called before its weights are loaded, which the plan counts.

    Args:
        recipe: as it is planned (`run_plan.settled`).
        checked: of the training data; at least one sample is kept.
        stored: run.json of the run that this one goes on with. It keeps the budget it had, so that it computes what it
            would have computed without the interruption; unless the recipe's own number has changed.
    """
    data = recipe.data
    is_auto = data.tokens_per_batch == "auto" and data.packing
    if stored is not None and "tokens_per_batch" in stored:
        before = stored["identity"]["recipe"]["data"].get("tokens_per_batch")
        if before == data.tokens_per_batch:
            reason = "what the run has had from its beginning" if is_auto else ""
            return ChosenBudget(stored["tokens_per_batch"], reason, tuple(stored[NOTES]))
    if not is_auto:
        return ChosenBudget(packing_budget(data, checked.lengths))
    from finetune.memory.auto_budget import auto_budget  # it plans, which takes the model's code

    return auto_budget(recipe, config, checked, free=free_device_memory(), device_type=device_type())


def packing_budget(data: Data, lengths: np.ndarray) -> int | None:
    """Tokens of one forward where memory has no say; None where every conversation has its own."""
    if not data.packing:
        return None
    if isinstance(data.tokens_per_batch, int):
        return data.tokens_per_batch
    return data.max_length or int(lengths.max())
