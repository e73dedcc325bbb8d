"""An estimate of an epoch from the lengths of the samples: tokens, optimizer steps, forwards of a step."""

from dataclasses import dataclass

import numpy as np

from finetune.batches.packing import pack
from finetune.batches.steps import count_steps
from finetune.data.checks.checked import Checked
from finetune.recipe import Recipe
from finetune.run.launch import planned_processes

SAMPLED_BATCHES = 200  # that are packed for the estimate


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data.

    Attributes:
        samples: repeated by the weights of their sources.
        tokens, supervised: of these samples.
        processes: of the run, by the environment variable WORLD_SIZE.
        samples_per_step: of all processes together.
        steps: optimizer steps of an epoch; `all_steps`, of the run.
        budget: tokens of one forward at most; None for one conversation in each forward.
        packs_per_step: forwards of one process in an optimizer step, on average.
        fill: share of the budget that is used, on average; None without one.
    """

    samples: int
    tokens: int
    supervised: int
    processes: int
    samples_per_step: int
    steps: int
    all_steps: int
    budget: int | None
    packs_per_step: float
    fill: float | None


def estimate_epoch(recipe: Recipe, checked: Checked, budget: int | None) -> Epoch:
    """Estimate an epoch of a recipe, by packing `SAMPLED_BATCHES` batches drawn with its seed.

    Args:
        checked: of the training data; at least one sample is kept.
        budget: tokens of one forward (see `finetune.memory.auto_budget.choose_budget`).
    """
    train = recipe.train
    indices = checked.first_epoch(recipe.seed)
    places = np.searchsorted(checked.kept, indices)
    lengths = checked.lengths[places]
    processes = planned_processes()
    batch, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    steps = count_steps(train, len(lengths), processes)
    drawn = np.random.default_rng(recipe.seed).permutation(len(lengths))[: SAMPLED_BATCHES * batch]
    packed = [pack(lengths[drawn[start : start + batch]].tolist(), budget) for start in range(0, len(drawn), batch)]
    packs = sum(map(len, packed))
    return Epoch(
        samples=len(lengths),
        tokens=int(lengths.sum()),
        supervised=int(checked.supervised[places].sum()),
        processes=processes,
        samples_per_step=batch * accumulation * processes,
        steps=steps.epoch,
        all_steps=steps.all,
        budget=budget,
        packs_per_step=packs / max(len(packed), 1) * min(accumulation, steps.batches),
        fill=None if budget is None or not packs else float(lengths[drawn].sum()) / (packs * budget),
    )
