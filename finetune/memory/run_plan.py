"""Before a run loads weights: settle what its recipe leaves open, plan its memory, and refuse what does not fit."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune.data.checks.checked import Checked
from finetune.errors import UserError
from finetune.memory.auto_switches import choose_switches
from finetune.memory.fitting import what_does_not_fit
from finetune.memory.free_memory import USABLE, device_type, free_device_memory, host_memory
from finetune.memory.plan import MemoryPlan, plan_memory
from finetune.memory.sharding import Sharding
from finetune.memory.switches import Switches
from finetune.memory.weights import settle_embeddings
from finetune.memory.workload import Workload, different_rows, worst_workload
from finetune.model.base import read_generation_config
from finetune.recipe import Recipe
from finetune.terminal import Say, say
from qwenvl import QwenVLConfig

SWITCHES = "switches"
"""Entry of run.json: the settled choices, so that a resumed run keeps its optimizer."""


@dataclass(frozen=True)
class RunPlan:
    """What a run will compute with on this machine, and the memory that it will need.

    Attributes:
        plan: of this process's device.
        capacity: bytes that can be used.
        refusal: why the run cannot be started; empty if it can.
        sharding: how cards share the model; None where each has all of it.
    """

    switches: Switches
    plan: MemoryPlan
    capacity: int
    refusal: str = ""
    sharding: Sharding | None = None

    def lines(self) -> list[str]:
        """The plan and the reasons of what was settled, in words."""
        shared = [] if self.sharding is None else [f"on each of {self.sharding.cards} GPUs that share the model"]
        return [*self.plan.lines(self.capacity), *shared, *self.switches.reasons]


def plan_run(
    recipe: Recipe,
    base: str,
    checked: Checked,
    budget: int | None,
    stored: Mapping[str, Any] | None,
    say: Say = say,
    sharding: Sharding | None = None,
) -> Switches:
    """Settle and plan a run, and print the plan.

    Args:
        base: folder or hub id of the checkpoint.
        checked: of the training data; at least one sample is kept.
        budget: tokens of one forward; None is one conversation at a time.
        stored: run.json of the run that is resumed; None for a new run.
        say: prints a labelled line.
        sharding: see `plan.plan_memory`.

    Raises:
        UserError: the run does not fit; the message lists settings with which it would.
    """
    found = look_at_memory(recipe, base, checked, budget, stored, sharding)
    for number, line in enumerate(found.lines()):
        say("" if number else "memory", line)
    if found.refusal:
        raise UserError(found.refusal)
    return found.switches


def look_at_memory(
    recipe: Recipe,
    base: str,
    checked: Checked,
    budget: int | None,
    stored: Mapping[str, Any] | None = None,
    sharding: Sharding | None = None,
) -> RunPlan:
    """As `plan_run`, without printing or refusing."""
    config = QwenVLConfig.from_pretrained(base)
    recipe = settled(recipe, base)
    where = device_type()
    capacity = int(free_device_memory() * USABLE)
    workload = largest_forward(recipe, checked, budget)
    switches = choose_switches(recipe, config, workload, capacity, device_type=where, sharding=sharding)
    if stored is not None and SWITCHES in stored and recipe.train.optim == "auto":
        # A checkpoint's optimizer states belong to one optimizer.
        switches = replace(switches, optim=stored[SWITCHES]["optim"])
    plan = plan_memory(recipe, config, workload, switches=switches, sharding=sharding)
    # Host memory can be swapped, or freed by other processes later: refuse only what exceeds the whole of it.
    limit = capacity if where == "cuda" else host_memory()
    refusal = ""
    if not plan.fits(limit):
        refusal = what_does_not_fit(recipe, plan, config, limit, switches=switches, sharding=sharding)
    return RunPlan(switches, plan, capacity, refusal, sharding)


def largest_forward(recipe: Recipe, checked: Checked, budget: int | None) -> Workload:
    """A bound on every forward of the training, in each respect."""
    batch = recipe.train.per_device_train_batch_size
    return worst_workload(**different_rows(checked, recipe.seed, batch), budget=budget, batch=batch)


def settled(recipe: Recipe, base: str) -> Recipe:
    """The recipe as it is planned: `adapter.train_embeddings: auto` settled by the checkpoint."""
    return settle_embeddings(recipe, read_generation_config(base))
