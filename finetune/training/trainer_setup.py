"""The trainer of a run, with its batches, callbacks and vision cache."""

from collections.abc import Callable, Sequence

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig

from finetune.batches.collate import Collator
from finetune.batches.image_request import VisionCache
from finetune.data.reading import rules_of
from finetune.evaluation.task_evaluation import TaskScorer
from finetune.files.disk_space import check_disk_space
from finetune.model.base import Base
from finetune.recipe import Recipe
from finetune.replies.replies import stop_ids_of
from finetune.run.folder import RunFolder
from finetune.run.left_out import LeftOut
from finetune.terminal import Say
from finetune.training.arguments import KEPT_CHECKPOINTS
from finetune.training.best_checkpoint import Patience, SaveBest
from finetune.training.budget_notes import NoteBudgets
from finetune.training.interrupts import StopOnSignal
from finetune.training.metrics_log import WriteMetrics
from finetune.training.phases import Phases
from finetune.training.progress import Progress, drop_own_printers
from finetune.training.run_record import NoteTimes
from finetune.training.save_times import SaveInTime
from finetune.training.trackers import TrackedConfig, facts_of_run
from finetune.training.trained_model import TrainedModel
from finetune.training.trainer import QwenVLTrainer
from finetune.training.training_data import TrainingData
from finetune.training.training_plan import TrainingPlan
from finetune.vision_cache.phase import cache_images
from qwenvl.checkpoint.record import ModelRecord

OwnOptimizer = Callable[[torch.nn.Module], torch.optim.Optimizer]


def encode_images(
    recipe: Recipe,
    base: Base,
    data: TrainingData,
    trained: TrainedModel,
    phases: Phases,
    left_out: LeftOut,
    say: Say,
) -> VisionCache | None:
    """Encode the images of the run, where the recipe has a vision cache."""
    phases.begin("load" if recipe.data.vision_cache == "off" else "encode")
    model, processor = trained.model, base.processor
    cache = cache_images(recipe, model, processor, data.samples, data.checked, data.task, left_out, say)
    phases.begin("load")
    return cache


def make_trainer(
    recipe: Recipe,
    run: RunFolder,
    base: Base,
    data: TrainingData,
    plan: TrainingPlan,
    trained: TrainedModel,
    arguments: TrackedConfig,
    cache: VisionCache | None,
    record: ModelRecord | None,
    left_out: LeftOut,
    *,
    stop: StopOnSignal,
    progress: Progress,
    phases: Phases,
    optimizer: OwnOptimizer | None,
    is_main: bool,
) -> QwenVLTrainer:
    """Put together everything that a training needs.

    Args:
        arguments: the trainer's configuration.
        cache: has the features of images that were encoded before; None where there is none.
        record: what the model is trained as, for its checkpoints.
        left_out: of this run.
        stop, progress, phases: callbacks.
        optimizer: makes the optimizer, in place of the one that the recipe names.

    Raises:
        NotEnoughDiskSpace: the checkpoints would not fit.
    """
    scorer = None
    if data.task is not None:
        scorer = TaskScorer(data.task, stop_ids_of(trained.model, base.processor.tokenizer), cache, left_out)
    if is_main:
        check_disk_space(run.path, checkpoint_bytes(recipe, trained, arguments), "the checkpoints")
    arguments.facts = facts_of_run(recipe, data, trained)
    budget = plan.budget.of_all_processes(arguments.device)
    rules = rules_of(recipe, base.processor)
    limits = {"eval": None if recipe.evaluate is None else recipe.evaluate.limit}
    indices: dict[str, Sequence[int]] = {
        name: checked.weighted_indices(recipe.seed)[: limits.get(name)] for name, checked in data.checked.items()
    }
    draws = data.checked["train"].epochs(recipe.seed)
    if draws is not None:
        indices["train"] = draws.used().tolist()
    trainer = QwenVLTrainer(
        trained.model,
        arguments,
        collators={
            name: Collator(samples, rules, base.processor.image_processor, cache)
            for name, samples in data.samples.items()
        },
        indices=indices,
        run=run,
        left_out=left_out,
        record=record,
        tokens_per_batch=budget.tokens,
        out_of_memory=budget.lowered,
        learning_rates=None if recipe.train.learning_rates is None else recipe.train.learning_rates.model_dump(),
        vision_layer_decay=recipe.train.vision_layer_decay,
        shuffle=recipe.data.shuffle,
        draws=draws,
        task_scorer=scorer,
        callbacks=[
            stop,
            progress,
            WriteMetrics(run),
            *_deciding_callbacks(recipe, arguments, trained),
            phases,  # behind the callbacks that decide about evaluating and saving
            NoteBudgets(run, budget),
            NoteTimes(run, phases),
        ],
        optimizer=optimizer and optimizer(trained.model),
    )
    drop_own_printers(trainer)
    return trainer


def _deciding_callbacks(recipe: Recipe, arguments: SFTConfig, trained: TrainedModel) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = []
    if recipe.evaluate is not None and recipe.evaluate.patience is not None:
        callbacks.append(Patience(recipe.evaluate.patience))
    if arguments.load_best_model_at_end:
        callbacks.append(SaveBest())
    saves = SaveInTime(
        recipe.train.save_minutes,
        asked=says_when_to_save(recipe),
        never=arguments.save_strategy == SaveStrategy.NO,
        expected_bytes=one_checkpoint_bytes(trained),
    )
    return [*callbacks, saves]


def one_checkpoint_bytes(trained: TrainedModel) -> int:
    """Bytes of a checkpoint: weights and AdamW's two moments in float32."""
    return trained.trained_parameters * 12


def checkpoint_bytes(recipe: Recipe, trained: TrainedModel, arguments: SFTConfig) -> int:
    """Bytes of all checkpoints that are there at a time: those that are kept, the one being written, the best, and one
    that only the time asked for."""
    kept = (arguments.save_total_limit or KEPT_CHECKPOINTS) + 1 + arguments.load_best_model_at_end
    passing = says_when_to_save(recipe) and arguments.save_strategy != SaveStrategy.NO
    return one_checkpoint_bytes(trained) * (kept + passing)


def says_when_to_save(recipe: Recipe) -> bool:
    """Whether the recipe itself says when to save; then these checkpoints are all written."""
    return not recipe.train.model_fields_set.isdisjoint({"save_steps", "save_strategy"})
