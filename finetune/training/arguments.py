"""TRL's `SFTConfig` of a run: the recipe's `train` section, and what follows from the rest of the recipe."""

from math import ceil
from pathlib import Path
from typing import Any

import torch

from finetune.errors import UserError
from finetune.memory.switches import Switches
from finetune.recipe import Recipe
from finetune.training.best_checkpoint import pick_best
from finetune.training.trackers import TrackedConfig

KEPT_CHECKPOINTS = 2
"""Checkpoints that stay in a run folder, where the recipe does not say."""

LEAST_PREFETCHED = 2
"""Batches each worker has ready, at least: PyTorch's own default."""


def trainer_arguments(recipe: Recipe, switches: Switches, task_metric: str | None) -> TrackedConfig:
    """The trainer's configuration.

    Args:
        switches: the optimizer and the recomputation, as the memory plan settled them.
        task_metric: what the task's score is logged as; None where no task is evaluated.
    """
    given = recipe.train_arguments() | switches.train_arguments
    if recipe.evaluate is not None:
        given.setdefault("eval_strategy", "epoch")
    keeps_best = keeps_best_checkpoint(recipe, given)
    given.pop("load_best_model_at_end", None)
    defaults = {
        "save_total_limit": KEPT_CHECKPOINTS,
        "report_to": "none",
        "logging_steps": 10,
        **loader_settings(recipe.data.workers, given["gradient_accumulation_steps"]),
    }
    arguments = sft_config({**defaults, **given}, output=str(Path(recipe.output)), seed=recipe.seed)
    if keeps_best or (recipe.evaluate is not None and recipe.evaluate.patience is not None):
        pick_best(arguments, task_metric or "eval_loss", keeps_it=keeps_best)
    return arguments


def keeps_best_checkpoint(recipe: Recipe, given: dict[str, Any]) -> bool:
    """Whether the result is the best checkpoint and not the last: where the recipe says so, or a task or patience is
    evaluated. `given` are the fields of `SFTConfig`.

    Raises:
        UserError: it says so, and that no checkpoint is saved.
    """
    evaluate = recipe.evaluate
    if given.get("save_strategy") == "no":
        if given.get("load_best_model_at_end"):
            raise UserError(
                "train.load_best_model_at_end needs checkpoints, and train.save_strategy is no: remove one of them"
            )
        return False
    by_default = evaluate is not None and (evaluate.task is not None or evaluate.patience is not None)
    by_default = by_default or given.get("save_strategy") == "best"
    return bool(given.get("load_best_model_at_end", by_default)) and given.get("eval_strategy", "no") != "no"


def sft_config(given: dict[str, Any], *, output: str, seed: int) -> TrackedConfig:
    """TRL's configuration, with the fields that this trainer decides.

    Args:
        given: fields from the recipe and what follows from them.
        output: the run folder.
        seed: for every random choice.
    """
    return TrackedConfig(
        **given,
        output_dir=output,
        seed=seed,
        data_seed=seed,
        bf16=False,
        fp16=False,
        use_cpu=not torch.cuda.is_available(),
        max_length=None,
        packing=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        label_names=["labels"],
        average_tokens_across_devices=True,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
    )


def loader_settings(workers: int, gradient_accumulation_steps: int) -> dict[str, Any]:
    """`SFTConfig`'s fields for the data loaders, which prefetch so that a slow disk does not delay a step.

    Images are sent as uint8, 0.6 MB each at 448 x 448, and normalised on the device.

    Args:
        workers: processes that make batches; with 0, nothing is prefetched.
        gradient_accumulation_steps: batches of an optimizer step; all of the next step are prefetched.
    """
    settings: dict[str, Any] = {"dataloader_num_workers": workers, "dataloader_pin_memory": torch.cuda.is_available()}
    if workers:
        settings["dataloader_prefetch_factor"] = max(LEAST_PREFETCHED, ceil(gradient_accumulation_steps / workers))
        # Otherwise every epoch and every evaluation waits for processes to start and the first batches to be made.
        settings["dataloader_persistent_workers"] = True
    return settings
