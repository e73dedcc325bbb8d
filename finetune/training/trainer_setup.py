"""The trainer of a run, with its batches, callbacks and vision cache."""

from collections.abc import Callable, Sequence

import torch
from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from finetune.batches.collate import Collator
from finetune.batches.image_request import VisionCache
from finetune.data.reading import rules_of
from finetune.evaluation.task_evaluation import TaskScorer
from finetune.files.disk_space import check_disk_space
from finetune.memory.weights import state_bytes
from finetune.recipe import Recipe
from finetune.replies.replies import stop_ids_of
from finetune.run.left_out import LeftOut
from finetune.terminal import Say
from finetune.training.arguments import KEPT_CHECKPOINTS
from finetune.training.best_checkpoint import Patience, SaveBest
from finetune.training.budget_notes import NoteBudgets
from finetune.training.interrupts import StopOnSignal
from finetune.training.metrics_log import WriteMetrics
from finetune.training.neftune import NoisyEmbeddings
from finetune.training.opened_run import OpenedRun
from finetune.training.phases import Phases
from finetune.training.progress import Progress, drop_own_printers
from finetune.training.run_record import NoteTimes
from finetune.training.save_times import SaveInTime
from finetune.training.trackers import TrackedConfig, facts_of_run
from finetune.training.trained_model import TrainedModel
from finetune.training.trainer import QwenVLTrainer
from finetune.training.training_plan import TrainingPlan
from finetune.vision_cache.phase import cache_images
from qwenvl.checkpoint.record import ModelRecord

OwnOptimizer = Callable[[torch.nn.Module], torch.optim.Optimizer]


def encode_images(
    opened: OpenedRun, trained: TrainedModel, phases: Phases, left_out: LeftOut, say: Say
) -> VisionCache | None:
    """Encode the images of the run, where the recipe has a vision cache."""
    recipe, data = opened.stepped, opened.data
    phases.begin("load" if recipe.data.vision_cache == "off" else "encode")
    cache = cache_images(
        recipe, trained.model, opened.base.processor, data.samples, data.checked, data.task, left_out, say
    )
    phases.begin("load")
    return cache


def make_trainer(
    opened: OpenedRun,
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
    recipe, run, base, data = opened.recipe, opened.run, opened.base, opened.data
    scorer = None
    if data.task is not None:
        scorer = TaskScorer(data.task, stop_ids_of(trained.model, base.processor.tokenizer), cache, left_out)
    if opened.is_main:
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
        loraplus_lr_ratio=recipe.train.loraplus_lr_ratio,
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
            *_noise(recipe.train.neftune_noise_alpha),
            NoteTimes(run, phases),
        ],
        optimizer=optimizer and optimizer(trained.model),
    )
    trainer.shares_folder = opened.shares_folder
    drop_own_printers(trainer)
    return trainer


def _noise(alpha: float | None) -> list[TrainerCallback]:
    return [] if alpha is None else [NoisyEmbeddings(alpha)]


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
        expected_bytes=one_checkpoint_bytes(trained, arguments),
    )
    return [*callbacks, saves]


def one_checkpoint_bytes(trained: TrainedModel, arguments: SFTConfig) -> int:
    """Bytes of a checkpoint with the states of the optimizer.

    An adapter's has what is trained; without one, the whole model is saved, with what is trained in float32.
    DeepSpeed's have the weights up to three times: whole, in its engine's states, and its optimizer's masters.
    """
    copies = 1 if arguments.deepspeed is None else 3
    states = state_bytes(trained.model, OptimizerNames(arguments.optim).value, arguments.device.type)
    return copies * sum(one.nbytes for one in saved_parameters(trained)) + states.device + states.host


def checkpoint_bytes(recipe: Recipe, trained: TrainedModel, arguments: SFTConfig) -> int:
    """Bytes of the result and of all checkpoints that are there at a time: those that are kept, the one being written,
    the best, and one that only the time asked for. The result is in the dtype that is computed in, an adapter in
    float32."""
    kept = (arguments.save_total_limit or KEPT_CHECKPOINTS) + 1 + arguments.load_best_model_at_end
    passing = says_when_to_save(recipe) and arguments.save_strategy != SaveStrategy.NO
    itemsize = 4 if isinstance(trained.model, PeftModel) else trained.computes_in.itemsize
    result = sum(min(one.nbytes, one.numel() * itemsize) for one in saved_parameters(trained))
    return one_checkpoint_bytes(trained, arguments) * (kept + passing) + result


def saved_parameters(trained: TrainedModel) -> list[torch.nn.Parameter]:
    """The parameters that are saved: of an adapter those that are trained, else all."""
    is_adapter = isinstance(trained.model, PeftModel)
    return [one for one in trained.model.parameters() if one.requires_grad or not is_adapter]


def says_when_to_save(recipe: Recipe) -> bool:
    """Whether the recipe itself says when to save; then these checkpoints are all written."""
    return not recipe.train.model_fields_set.isdisjoint({"save_steps", "save_strategy"})
