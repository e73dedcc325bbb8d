"""TRL's `SFTConfig` of a run: the recipe's `train` section, and what follows from the rest of the recipe."""

from math import ceil
from pathlib import Path
from typing import Any

import torch

from finetune.errors import UserError
from finetune.memory.switches import Switches
from finetune.recipe import Recipe
from finetune.recipe.best_score import evaluates_when, followed_score, follows_score, higher_is_better, keeps_best
from finetune.recipe.train_checks import BY_SCORE
from finetune.training.parallel import Parallel, parallel_arguments
from finetune.training.trackers import TrackedConfig

KEPT_CHECKPOINTS = 2
"""Checkpoints that stay in a run folder, where the recipe does not say."""

LEAST_PREFETCHED = 2
"""Batches each worker has ready, at least: PyTorch's own default."""


def trainer_arguments(
    recipe: Recipe,
    switches: Switches,
    task_metric: str | None,
    computes_in: torch.dtype,
    parallel: Parallel | None = None,
) -> TrackedConfig:
    """The trainer's configuration.

    Args:
        switches: the optimizer and the recomputation, as the memory plan settled them.
        task_metric: what the task's score is logged as; None where no task is evaluated.
        computes_in: dtype of frozen weights and activations.
        parallel: how processes share the work; None where there is one.

    Raises:
        UserError: the libraries refuse a value, with their reason.
    """
    train, evaluate = recipe.train, recipe.evaluate
    given = recipe.train_arguments() | switches.train_arguments
    given = parallel_arguments(parallel or Parallel(), given, has_adapter=recipe.adapter is not None)
    given["eval_strategy"] = evaluates_when(train, evaluate)
    # Set below, or it would want `save_steps` to be a multiple of `eval_steps`: `SaveBest` saves the best besides.
    given.pop("load_best_model_at_end", None)
    given.pop("neftune_noise_alpha", None)  # see `training.neftune`
    if follows_score(train, evaluate):
        score = followed_score(train, task_metric)
        higher = higher_is_better(score)
        given |= {"metric_for_best_model": score, "greater_is_better": higher}
        if train.lr_scheduler_type in BY_SCORE:
            mode = {"mode": "max" if higher else "min"}
            given["lr_scheduler_kwargs"] = mode | dict(given.get("lr_scheduler_kwargs") or {})
    defaults = {
        "save_total_limit": KEPT_CHECKPOINTS,
        "report_to": "none",
        "logging_steps": 10,
        **loader_settings(recipe.data.workers, given["gradient_accumulation_steps"]),
    }
    precision = mixed_precision(computes_in, in_full=recipe.adapter is None)
    try:
        arguments = sft_config({**defaults, **given, **precision}, output=str(Path(recipe.output)), seed=recipe.seed)
    except ValueError as error:
        raise UserError(f"train: Transformers refuses these settings: {error}") from error
    arguments.load_best_model_at_end = keeps_best(train, evaluate)
    return arguments


def mixed_precision(computes_in: torch.dtype, *, in_full: bool) -> dict[str, bool]:
    """`SFTConfig`'s fields for a model whose trained weights are float32.

    `bf16` and `fp16` are for what is sharded, whose weights FSDP2 and DeepSpeed round; otherwise the trainer rounds
    them (`finetune.model.masters`), and never by autocast. `fp16` scales the loss too, so that small gradients of
    activations do not become zero.

    Args:
        computes_in: dtype of frozen weights and activations.
        in_full: without an adapter. An adapter is computed in float32 beside a 16-bit base.
    """
    return {"bf16": in_full and computes_in == torch.bfloat16, "fp16": computes_in == torch.float16}


def sft_config(given: dict[str, Any], *, output: str, seed: int) -> TrackedConfig:
    """TRL's configuration, with the fields that this trainer decides.

    Args:
        given: fields from the recipe and what follows from them. Without those of `mixed_precision` it is none.
        output: the run folder.
        seed: for every random choice.
    """
    return TrackedConfig(
        **{"bf16": False, "fp16": False, **given},  # TRL's default is bf16
        output_dir=output,
        seed=seed,
        data_seed=seed,
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
