"""What fits into memory: the largest packing budget, and settings with which a run would fit that does not."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec

from finetune.errors import InputError
from finetune.memory.auto_switches import choose_switches
from finetune.memory.plan import MemoryPlan, plan_memory
from finetune.memory.several_cards import describe_several, fewest_cards
from finetune.memory.sharding import Sharding
from finetune.memory.switches import Switches
from finetune.memory.workload import Workload, worst_workload
from finetune.quantities import format_bytes
from finetune.recipe import Recipe, RecipeError, parse_recipe
from qwenvl import QwenVLConfig

STEP = 32
"""Tokens. Budgets are multiples of it, except the longest conversation and a whole batch."""

# Settings that make a run smaller, in the order of how little they change what it computes.
REMEDIES = (
    ("train.checkpointing=full",),
    ("train.gradient_checkpointing=true",),
    ("data.tokens_per_batch={budget}",),
    ("model.embeddings_on_cpu=true",),
    ("train.optim=paged_adamw_8bit",),
    ("data.vision_cache=disk",),
    ("train.checkpointing=offload",),
    ("model.quantization=nf4", "model.quantize=[language, vision]"),
    ("model.quantization=nf4", "model.quantize=[language, vision, head]"),
    ("adapter.r=16",),
)
NEED_BITSANDBYTES = ("train.optim=paged_adamw_8bit", "model.quantization=nf4")
NOT_SHARED = (*NEED_BITSANDBYTES, "model.embeddings_on_cpu=true", "data.vision_cache=disk")
"""Those that do not go with a model that processes share."""


def largest_budget(
    recipe: Recipe,
    config: QwenVLConfig,
    capacity: int,
    *,
    lengths: Sequence[int],
    supervised: Sequence[int],
    images: Sequence[int],
    switches: Switches,
    sharding: Sharding | None = None,
) -> int | None:
    """The largest packing budget, in tokens, that fits; None if not even the longest conversation does.

    Args:
        capacity: bytes that the run can plan with.
        lengths, supervised, images: of each conversation (see `workload.worst_workload`).

    Returns:
        At least the tokens of the longest conversation; at most those of the longest possible batch.
    """
    batch = recipe.train.per_device_train_batch_size

    def spare(budget: int) -> int:
        workload = worst_workload(lengths, supervised, images, budget=budget, batch=batch)
        return capacity - plan_memory(recipe, config, workload, switches=switches, sharding=sharding).peak

    lowest, highest = max(lengths), sum(sorted(lengths)[-batch:])
    if (room := spare(lowest)) < 0:
        return None
    if highest <= lowest or (lack := spare(highest)) >= 0:
        return max(lowest, highest)
    return _last_that_fits(spare, lowest, room, highest, lack)


def _last_that_fits(spare: Callable[[int], int], fits: int, room: int, too_much: int, lack: int) -> int:
    """Search between a budget that fits and one that does not, by bisection and regula falsi in turn.

    Args:
        spare: bytes that a budget leaves; negative if it does not fit.
        fits, room: a budget that fits, and what it leaves.
        too_much, lack: a larger one that does not, and what it leaves (negative).
    """
    by_line = True
    while too_much - fits > STEP:
        share = room / (room - lack) if by_line else 0.5
        tried = fits + round((too_much - fits) * share)
        tried = max(tried // STEP * STEP, fits + 1)
        if tried >= too_much:
            tried = too_much - STEP if too_much - STEP > fits else (fits + too_much) // 2
        if (now := spare(tried)) >= 0:
            fits, room = tried, now
        else:
            too_much, lack = tried, now
        by_line = not by_line
    return fits


def remedies(
    recipe: Recipe,
    config: QwenVLConfig,
    workload: Workload,
    capacity: int,
    *,
    switches: Switches,
    sharding: Sharding | None = None,
) -> list[str]:
    """Settings with which a run would fit that does not, as they are written on the command line.

    Each is tried by planning the run with it.

    Args:
        recipe: with `adapter.train_embeddings` settled.
        workload: the run's largest forward.
        capacity: bytes that the run can plan with.
        switches: as they were chosen.

    Returns:
        The settings that suffice alone; if none does, one combination that needs each of its parts; else nothing.
    """
    trials = _Trials(recipe, config, workload, capacity, switches, sharding)
    useful = [remedy for remedy in trials.remedies() if trials.peak(remedy) < trials.before]
    alone = [remedy for remedy in useful if trials.peak(remedy) <= capacity]
    if alone:
        return [" ".join(remedy) for remedy in alone]
    together: list[tuple[str, ...]] = []
    for remedy in useful:
        together.append(remedy)
        if trials.peak(_joined(together)) <= capacity:
            return [" ".join(_joined(trials.needed(together)))]
    return []


def _joined(several: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """All settings of several remedies; of two for one key the last."""
    by_key = {setting.partition("=")[0]: setting for remedy in several for setting in remedy}
    return tuple(by_key.values())


class _Trials:
    """Plans a run with remedies, each combination once.

    Attributes:
        before: bytes that the run needs without any.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: QwenVLConfig,
        workload: Workload,
        capacity: int,
        switches: Switches,
        sharding: Sharding | None,
    ):
        self.recipe, self.config, self.workload = recipe, config, workload
        self.capacity, self.switches, self.sharding = capacity, switches, sharding
        self.before = plan_memory(recipe, config, workload, switches=switches, sharding=sharding).peak
        self.written = recipe.to_yaml()
        self.known: dict[tuple[str, ...], float] = {}

    def remedies(self) -> Iterator[tuple[str, ...]]:
        """Those of `REMEDIES` that can be taken here."""
        budget = max(self.workload.sequence_length, self.recipe.data.max_length or 0)
        has_bitsandbytes = find_spec("bitsandbytes") is not None
        for remedy in REMEDIES:
            if remedy[0] in NEED_BITSANDBYTES and not has_bitsandbytes:
                continue
            adapter = self.recipe.adapter
            if remedy[0].startswith("adapter.r=") and adapter is not None and adapter.from_ is not None:
                continue  # its rank is that of the adapter that it goes on from
            if remedy[0] in NOT_SHARED and self.sharding is not None:
                continue
            if "{budget}" not in remedy[0]:
                yield remedy
            elif budget < self.workload.tokens:
                yield (remedy[0].format(budget=budget),)

    def peak(self, remedy: tuple[str, ...]) -> float:
        """Bytes that the run needs with it; infinite if the recipe is invalid with it."""
        if remedy not in self.known:
            self.known[remedy] = self._peak(remedy)
        return self.known[remedy]

    def needed(self, together: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Drop remedies that are not needed from some that suffice together, those that change most first."""
        needed = list(together)
        for remedy in reversed(together):
            others = [one for one in needed if one != remedy]
            if others and self.peak(_joined(others)) <= self.capacity:
                needed = others
        return needed

    def _peak(self, remedy: tuple[str, ...]) -> float:
        try:
            recipe = parse_recipe(self.written, list(remedy))
        except RecipeError:
            return float("inf")
        workload = self._workload(recipe)
        device_type = self.switches.device_type
        try:
            switches = choose_switches(
                recipe, self.config, workload, self.capacity, device_type=device_type, sharding=self.sharding
            )
            return plan_memory(recipe, self.config, workload, switches=switches, sharding=self.sharding).peak
        except InputError:
            return float("inf")

    def _workload(self, recipe: Recipe) -> Workload:
        """The largest forward with another packing budget: everything in proportion."""
        budget = recipe.data.tokens_per_batch
        if not isinstance(budget, int) or budget >= self.workload.tokens:
            return self.workload
        whole, share = self.workload, budget / self.workload.tokens
        span = self.config.n_queries + 2
        return replace(
            whole,
            tokens=budget,
            supervised=min(whole.supervised, budget - 1),
            sequences=max(1, min(whole.sequences, round(whole.sequences * share))),
            images=min(whole.images, budget // span),
        )


def what_does_not_fit(
    recipe: Recipe,
    plan: MemoryPlan,
    config: QwenVLConfig,
    capacity: int,
    *,
    switches: Switches,
    sharding: Sharding | None = None,
) -> str:
    """The message for a run that does not fit: what it needs, and settings with which it would fit."""
    workload, fullest = plan.workload, plan.fullest
    lines = [
        f"the run needs {format_bytes(plan.peak)} ({fullest.name}), and {format_bytes(capacity)} can be used "
        f"{'of what is free on the GPU' if switches.device_type == 'cuda' else 'here'}. Its largest forward has "
        f"{workload.tokens:,} tokens and {workload.images:,} images",
        *(f"  {line}" for line in plan.lines()[1:]),
    ]
    if recipe.adapter is None and switches.device_type == "cuda":
        several = describe_several(fewest_cards(recipe, config, workload))
        lines.append(f"Trained in full it {several}, several of which share the model with train.parallel: fsdp")
    found = remedies(recipe, config, workload, capacity, switches=switches, sharding=sharding)
    if not found:
        return "\n".join([*lines, "No setting known here makes it fit: take a larger GPU, or shorter conversations"])
    return "\n".join([*lines, "It would fit, by the plan, with", *(f"  {one}" for one in found)])
