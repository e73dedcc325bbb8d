"""Before a run loads weights: what its recipe leaves open is settled, its memory planned, and shown or refused."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from transformers import GenerationConfig

from finetune.data.checking import Checked
from finetune.errors import UserError
from finetune.memory.auto_switches import choose_switches
from finetune.memory.fitting import what_does_not_fit
from finetune.memory.free_memory import CGROUP, USABLE, device_type, free_device_memory
from finetune.memory.plan import MemoryPlan, plan_memory
from finetune.memory.switches import Switches
from finetune.memory.weights import settle_embeddings
from finetune.memory.workload import Workload, different_rows, worst_workload
from finetune.recipe import Recipe
from finetune.terminal import Say
from qwenvl import QwenVLConfig

SWITCHES = "switches"
"""Entry of run.json: what was settled, so that a resumed run goes on with the same optimizer."""


@dataclass(frozen=True)
class RunPlan:
    """What a run will do and hold here.

    Attributes:
        plan: None for a model that processes share, of which each holds a part.
        capacity: bytes that can be used.
        refusal: why it cannot be; empty where it can.
    """

    switches: Switches
    plan: MemoryPlan | None
    capacity: int
    refusal: str = ""

    def lines(self) -> list[str]:
        """For a run's first lines."""
        planned = [] if self.plan is None else self.plan.lines(self.capacity)
        return [*planned, *self.switches.reasons]


def plan_run(
    recipe: Recipe,
    base: str,
    checked: Checked,
    budget: int | None,
    stored: Mapping[str, Any] | None,
    say: Say,
) -> Switches:
    """Settle, plan, and say so.

    Args:
        base: folder or hub id of the checkpoint.
        checked: of the training data; at least one sample is kept.
        budget: tokens of one forward; None is one conversation at a time.
        stored: run.json of the run that this one goes on with.
        say: prints a line.

    Raises:
        UserError: the run does not fit; with the settings that would make it fit.
    """
    found = look_at_memory(recipe, base, checked, budget, stored)
    for number, line in enumerate(found.lines()):
        say("" if number else "memory", line)
    if found.refusal:
        raise UserError(found.refusal)
    return found.switches


def look_at_memory(
    recipe: Recipe, base: str, checked: Checked, budget: int | None, stored: Mapping[str, Any] | None = None
) -> RunPlan:
    """As `plan_run`, without saying anything."""
    config = QwenVLConfig.from_pretrained(base)
    recipe = settled(recipe, base)
    where = device_type()
    capacity = int(free_device_memory() * USABLE)
    workload = largest_forward(recipe, checked, budget)
    if is_sharded(recipe):
        return RunPlan(choose_switches(recipe, config, workload, None, device_type=where), None, capacity)
    switches = choose_switches(recipe, config, workload, capacity, device_type=where)
    if stored is not None and SWITCHES in stored and recipe.train.optim == "auto":
        # The states of a checkpoint are one optimizer's.
        switches = replace(switches, optim=stored[SWITCHES]["optim"])
    plan = plan_memory(recipe, config, workload, switches=switches)
    # Host memory can be swapped and freed by others meanwhile: only what can never be is refused.
    limit = capacity if where == "cuda" else host_memory()
    refusal = ""
    if not plan.fits(limit):
        refusal = what_does_not_fit(recipe, plan, config, limit, switches=switches)
    return RunPlan(switches, plan, capacity, refusal)


def largest_forward(recipe: Recipe, checked: Checked, budget: int | None) -> Workload:
    """No forward of the training is larger in any respect."""
    batch = recipe.train.per_device_train_batch_size
    return worst_workload(**different_rows(checked, recipe.seed, batch), budget=budget, batch=batch)


def is_sharded(recipe: Recipe) -> bool:
    """Whether processes share the model, by FSDP or DeepSpeed."""
    given = bool(recipe.train.fsdp) or recipe.train.deepspeed is not None
    return given or any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))


def host_memory(cgroup: Path = CGROUP) -> int:
    """All memory of this machine, or of the container's limit if that is less."""
    whole = psutil.virtual_memory().total
    try:
        limit = (cgroup / "memory.max").read_text().strip()
    except OSError:  # no control groups of version 2
        return whole
    return whole if limit == "max" else min(whole, int(limit))


def settled(recipe: Recipe, base: str) -> Recipe:
    """The recipe with what its checkpoint says of `adapter.train_embeddings: auto`, as it is planned."""
    return settle_embeddings(recipe, _generation_config(base))


def _generation_config(base: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(base)
    except OSError:  # it has none
        return None
