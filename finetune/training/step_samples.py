"""The samples of an optimizer step, which a run keeps when it goes on with another number of processes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.recipe import Recipe
from finetune.terminal import Say

STEP = "step_samples"
"""Key of run.json."""


@dataclass(frozen=True)
class StepSamples:
    """What a step's samples are the product of."""

    processes: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int

    @classmethod
    def of(cls, recipe: Recipe, processes: int) -> "StepSamples":
        train = recipe.train
        return cls(processes, train.per_device_train_batch_size, train.gradient_accumulation_steps)

    @property
    def samples(self) -> int:
        return self.processes * self.per_device_train_batch_size * self.gradient_accumulation_steps

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def step_samples_before(stored: Mapping[str, Any], recipe: Recipe, checkpoint: Path) -> StepSamples | None:
    """How a run came to the samples of its steps; None where nothing tells.

    Args:
        stored: run.json.
        recipe: of the run.
        checkpoint: of a run whose run.json does not say it: a checkpoint has a file of each process.
    """
    if (told := stored.get(STEP)) is not None:
        return StepSamples(**told)
    processes = len(list(checkpoint.glob("rng_state_*.pth"))) or int((checkpoint / "rng_state.pth").is_file())
    return StepSamples.of(recipe, processes) if processes else None


def keep_samples_per_step(
    recipe: Recipe, before: StepSamples | None, processes: int, epoch_samples: int, say: Say
) -> Recipe:
    """The recipe with as many accumulation steps as keep the samples of a step.

    Which samples a step has depends on their number alone: batches are dealt out to the processes in turn, and at an
    epoch's end places stay empty (see `epoch_sampler`).

    Args:
        before: see `step_samples_before`.
        processes: of this part of the run.
        epoch_samples: of an epoch.

    Raises:
        UserError: that many processes cannot have the steps of the run; with the numbers that can.
    """
    if before is None or before.processes == processes:
        if before is None:
            return recipe
        return _with_accumulation(recipe, before.gradient_accumulation_steps)
    batches = before.processes * before.gradient_accumulation_steps  # of a step
    if batches % processes:
        numbers = [str(number) for number in range(1, batches + 1) if batches % number == 0]
        raise UserError(
            f"{recipe.output}: a step of this run has {before.samples:,} samples, and {processes} processes with "
            f"train.per_device_train_batch_size {before.per_device_train_batch_size} cannot have as many: start it on "
            f"{' or '.join([', '.join(numbers[:-1]), numbers[-1]] if len(numbers) > 1 else numbers)} processes"
        )
    if recipe.train.dataloader_drop_last:
        whole = epoch_samples // before.per_device_train_batch_size
        if whole // processes * processes != whole // before.processes * before.processes:
            raise UserError(
                f"{recipe.output}: train.dataloader_drop_last leaves out other samples at the end of an epoch on "
                f"{processes} processes than on {before.processes}: start it on {before.processes}"
            )
    accumulation = batches // processes
    say(
        "processes",
        f"{processes} now, {before.processes} before: {accumulation} accumulation steps instead of "
        f"{before.gradient_accumulation_steps}, so that a step has {before.samples:,} samples as before; what dropout "
        "draws is not as it would have been",
    )
    return _with_accumulation(recipe, accumulation)


def _with_accumulation(recipe: Recipe, steps: int) -> Recipe:
    train = recipe.train.model_copy(update={"gradient_accumulation_steps": steps})
    return recipe.model_copy(update={"train": train})
