"""The whole road from a recipe to a trained adapter, in the order in which it is walked."""

import contextlib
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, set_seed
from trl import SFTConfig

from finetune.batches.collate import Collator
from finetune.data.checking import Checked
from finetune.data.reading import read_checked, rules_of
from finetune.data.samples import Samples
from finetune.data.shown_rows import shown_samples
from finetune.data.summary import count_rows, describe_data, lines_left_out
from finetune.errors import Interrupted, UserError
from finetune.evaluation.predictions import write_predictions
from finetune.evaluation.task_evaluation import TaskEvaluation, score_line
from finetune.files.atomic_writes import write_text
from finetune.files.disk_space import check_disk_space
from finetune.memory.auto_budget import choose_budget
from finetune.memory.out_of_memory import NoteBudgets
from finetune.memory.run_plan import SWITCHES, plan_run, settled
from finetune.model.base import find_base, make_trainable, refuse_untaught
from finetune.model.components import count_parameters, table_of_parameters
from finetune.model.computing import choose_computing, choose_dtype, is_random, own_device, quantization_arguments
from finetune.recipe import Recipe
from finetune.report.report import write_report
from finetune.run.checkpoints import Found, clean_partials, find_last_good, writing
from finetune.run.environment import describe_environment
from finetune.run.folder import RunFolder
from finetune.run.identity import compare_runs
from finetune.training.arguments import loader_settings, sft_config
from finetune.training.best_checkpoint import Patience, SaveBest, pick_best
from finetune.training.interrupts import StopOnSignal
from finetune.training.metrics_log import WriteMetrics
from finetune.training.phases import Phases
from finetune.training.processes import parting_at_the_end
from finetune.training.progress import Progress, drop_own_printers, summary
from finetune.training.trainer import QwenVLTrainer
from finetune.vision_cache.phase import cache_images
from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration, load_model
from qwenvl.checkpoint.fingerprint import weights_fingerprint, write_base
from qwenvl.model.kernels import use_kernels

KEPT_CHECKPOINTS = 2
LEFT_OUT = "left_out.jsonl"

OwnOptimizer = Callable[[torch.nn.Module], torch.optim.Optimizer]

# What may change between the parts of one run without changing what it computes.
FREE_TO_CHANGE = (
    # The base is told by its fingerprint, wherever it lies.
    *("model.path", "output", "resume", "evaluate.predictions", "evaluate.max_new_tokens", "data.workers"),
    "data.tokens_per_batch",  # but for rounding, and for which inputs dropout drops
    *("data.vision_cache", "data.vision_cache_gb", "model.attention", "model.kernels"),  # but for rounding
    "train.checkpointing",
    *(f"train.{key}" for key in ("logging_steps", "logging_strategy", "save_steps", "save_total_limit", "report_to")),
)


def train(recipe: Recipe, say: Callable[[str], None] = print, optimizer: OwnOptimizer | None = None) -> Path:
    """Train as the recipe says, or go on with a run that was interrupted.

    Args:
        recipe: the resolved recipe.
        say: prints a line; only the main process of a distributed run speaks.
        optimizer: makes an optimizer of the model, in place of the one that `train.optim` names and with the same
            schedule; for what has no name there.

    Returns:
        The run folder.

    Raises:
        UserError, ValueError, FileNotFoundError: the input is wrong (see the message).
        RunLocked: another process holds the run folder.
        Interrupted: SIGTERM or SIGINT; the state is saved if training had begun.
    """
    is_main = int(os.environ.get("RANK", "0")) == 0
    say = say if is_main else lambda line: None
    run = RunFolder(Path(recipe.output))
    with contextlib.ExitStack() as stack:
        if is_main:
            stack.enter_context(run.lock())
        stack.enter_context(parting_at_the_end())
        stop = stack.enter_context(StopOnSignal())
        road = _Road(recipe, run, is_main, say, stop, optimizer)
        try:
            road.walk()
        except BaseException as error:
            road.note_end("interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed")
            raise
    return run.path


class _Road:
    """The steps of one run; each leaves what the next ones need."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        is_main: bool,
        say: Callable[[str], None],
        stop: StopOnSignal,
        optimizer: OwnOptimizer | None = None,
    ):
        self.recipe = recipe
        self.own_optimizer = optimizer
        self.run = run
        self.is_main = is_main
        self.say = say
        self.stop = stop
        self.notes: list[str] = []
        self.description: dict[str, Any] = {}
        self.phases = Phases("read")

    def walk(self):
        started = time.monotonic()
        self.find_base()
        self.read_data()
        last = self.find_last_checkpoint()
        if last is None:
            return
        self.phases.begin("load")
        self.choose_budget()
        model = self.load_model()
        self.describe_run()
        trainer = self.make_trainer(model)
        if last.path is None and self.evaluates:
            self.predict(trainer, "before")
        try:
            trainer.train(resume_from_checkpoint=None if last.path is None else str(last.path))
        finally:
            self.progress.close()
        self.stop.raise_if_received()
        self.phases.begin("save")
        self.save_result(trainer)
        if self.evaluates:
            self.predict(trainer, "after")
        self.finish(trainer, time.monotonic() - started)

    def note_end(self, status: str):
        """Say in run.json how a run ended that did not finish."""
        if self.is_main and self.description:
            self.run.write_run({**self.description, "status": status, "phases": self.phases.record()})

    # Before anything heavy is loaded

    def find_base(self):
        base = find_base(self.recipe.model)
        self.base, self.quantized, self.processor = base.path, base.quantized, base.processor
        self.computing = choose_computing(self.recipe.model)
        self.say(f"model       {self.recipe.model.path}: {self.computing}")

    def read_data(self):
        recipe = self.recipe
        self.evaluates = recipe.evaluate is not None
        self.samples: dict[str, Samples] = {}
        self.checked: dict[str, Checked] = {}
        for name, part in read_checked(recipe, self.processor, show_progress=self.is_main).items():
            self.samples[name], self.checked[name] = part
            self.say(f"{name + ' data':<11} {describe_data(self.checked[name])}")
        self.task: TaskEvaluation | None = None
        if self.evaluates and recipe.evaluate.task is not None:
            self.task = TaskEvaluation(recipe, self.processor)
            self.say(f"{'eval task':<11} {self.task}")

    # Where the run stands

    def find_last_checkpoint(self) -> Found | None:
        """Where to go on from; None where the run is finished already.

        Raises:
            UserError: the folder holds a run of another recipe, other data or another base.
        """
        # After the data was checked: for a hub id this fetches the weights.
        self.base_fingerprint = weights_fingerprint(self.base)
        self.identity = {
            "recipe": self.recipe.model_dump(mode="json"),
            "data": {name: samples.fingerprint() for name, samples in self.samples.items()},
            "base": self.base_fingerprint,
        }
        self.stored = stored = self.run.read_run()
        if self.is_main:
            clean_partials(self.run.path)
            clean_partials(self.run.checkpoints)
        self.score_so_far: dict[str, Any] = {}
        if stored is None or "identity" not in stored:
            return Found(None, 0, [])
        differences = compare_runs(stored["identity"], self.identity, tuple(f"recipe.{key}" for key in FREE_TO_CHANGE))
        if self.recipe.resume == "never" or differences:
            what = (
                f"{self.run.path} holds a run already, and resume is never"
                if not differences
                else f"{self.run.path} holds a run that this one would not continue:\n  " + "\n  ".join(differences)
            )
            raise UserError(f"{what}\nGive another output, or remove that folder")
        if stored.get("status") == "finished":
            self.say(
                f"{self.run.path} is finished: its adapter and report are there. Give another output to train anew"
            )
            return None
        last = find_last_good(self.run.checkpoints)
        for folder, reason in last.damaged:
            self.say(f"resume      {folder.name} is damaged ({reason}): going back to the one before")
        if last.path is not None:
            self.say(f"resume      from step {last.step}")
        if self.is_main:
            # A run that begins anew logs its scores of step 0 anew as well.
            self.run.forget_metrics_after(last.step if last.path is not None else -1)
        if last.path is not None:
            self.score_so_far = stored.get("score", {})
        return last

    def choose_budget(self):
        """How many tokens a forward may have; by what is free before the weights are loaded, which count as well."""
        config = QwenVLConfig.from_pretrained(self.base)
        self.budget = choose_budget(settled(self.recipe, self.base), config, self.checked["train"], self.stored)
        if self.budget.reason:
            self.say(f"packing     {self.budget}")
        data, tokens = self.checked["train"], self.budget.tokens
        self.switches = plan_run(self.recipe, self.base, data, tokens, self.stored, self.say)

    def describe_run(self):
        if not self.is_main:
            return
        self.run.write_recipe(self.recipe.to_yaml())
        self.description = {
            "status": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": self.recipe.model.path,
            "quantized": list(self.quantized),
            "identity": self.identity,
            "environment": describe_environment(),
            "parameters": {
                name: {"trained": count.trained, "total": count.total} for name, count in self.parameters.items()
            },
            "rows": {name: count_rows(checked) for name, checked in self.checked.items()},
            "notes": self.notes,
            SWITCHES: {"optim": self.switches.optim},
            **({"score": self.score_so_far} if self.score_so_far else {}),
        }
        self.run.write_run(self.description)
        left_out = [line for checked in self.checked.values() for line in lines_left_out(checked)]
        write_text(self.run.path / LEFT_OUT, "".join(left_out))

    # Model

    def load_model(self) -> QwenVLForConditionalGeneration | PeftModel:
        recipe = self.recipe
        set_seed(recipe.seed)
        model = load_model(
            recipe.model.path,
            dtype=choose_dtype(recipe.model.dtype),
            device_map=own_device() if self.quantized else None,
            embeddings_on_cpu=recipe.model.embeddings_on_cpu,
            **quantization_arguments(recipe.model),
        )
        model.set_attn_implementation(self.computing.attention)
        use_kernels(model, self.computing.kernels)
        if is_random(model):
            self.notes.append(
                "The checkpoint's weights are random: it can show that training works, not that it reads."
            )
        model = make_trainable(model, recipe)
        self.switches.prepare(model, recipe.train)
        refuse_untaught(model, self.checked["train"])
        self.parameters = count_parameters(model)
        for number, line in enumerate(table_of_parameters(self.parameters)):
            self.say(f"{'trained' if number == 0 else '':<11} {line}")
        for note in self.notes:
            self.say(f"note        {note}")
        return model

    # Training

    def make_trainer(self, model: QwenVLForConditionalGeneration | PeftModel) -> QwenVLTrainer:
        recipe, data = self.recipe, self.recipe.data
        arguments = self.trainer_arguments(model)
        self.phases.begin("load" if data.vision_cache == "off" else "encode")
        cache = cache_images(recipe, model, self.processor, self.samples, self.checked, self.task, self.say)
        self.phases.begin("load")
        collators = {
            name: Collator(samples, rules_of(recipe, self.processor), self.processor.image_processor, cache)
            for name, samples in self.samples.items()
        }
        if self.task is not None:
            self.task.note_stop_ids(model)
        trained = sum(count.trained for count in self.parameters.values())
        if self.is_main:
            # Weights and AdamW's two moments in float32, for each checkpoint kept and the one being written.
            kept = (arguments.save_total_limit or KEPT_CHECKPOINTS) + 1 + arguments.load_best_model_at_end
            check_disk_space(self.run.path, trained * 12 * kept, "the checkpoints")
        self.progress = Progress(checkpoints=self.run.checkpoints)
        callbacks: list[TrainerCallback] = [self.stop, self.progress, WriteMetrics(self.run)]
        if self.evaluates and recipe.evaluate.patience is not None:
            callbacks.append(Patience(recipe.evaluate.patience))
        if arguments.load_best_model_at_end:
            callbacks.append(SaveBest())
        callbacks.append(self.phases)
        budget = self.budget.of_all_processes(arguments.device)
        callbacks.append(NoteBudgets(self.run, self.description, budget))
        trainer = QwenVLTrainer(
            model,
            arguments,
            collators=collators,
            indices={
                name: checked.weighted_indices(recipe.seed)[: recipe.evaluate.limit if name == "eval" else None]
                for name, checked in self.checked.items()
            },
            run=self.run,
            tokens_per_batch=budget.tokens,
            out_of_memory=budget.lowered,
            learning_rates=recipe.train.learning_rates and recipe.train.learning_rates.model_dump(),
            vision_layer_decay=recipe.train.vision_layer_decay,
            shuffle=data.shuffle,
            task_evaluation=self.task,
            callbacks=callbacks,
            optimizer=self.own_optimizer and self.own_optimizer(model),
        )
        drop_own_printers(trainer)
        return trainer

    def trainer_arguments(self, model: QwenVLForConditionalGeneration | PeftModel) -> SFTConfig:
        """The recipe's `train` section with what follows from the rest of the recipe."""
        given = self.recipe.train_arguments() | self.switches.train_arguments
        if self.evaluates:
            given.setdefault("eval_strategy", "epoch")
        loading = loader_settings(self.recipe.data.workers, given["gradient_accumulation_steps"])
        picks_best = self.picks_best(given)
        given = {"save_total_limit": KEPT_CHECKPOINTS, "report_to": "none", "logging_steps": 10, **loading, **given}
        arguments = sft_config(given, output=str(self.run.path), seed=self.recipe.seed)
        if picks_best:
            pick_best(arguments, "eval_loss" if self.task is None else self.task.key)
        return arguments

    def picks_best(self, given: dict[str, Any]) -> bool:
        """Whether the result is the best checkpoint and not the last. Taken out of `given`: see `pick_best`."""
        evaluate = self.recipe.evaluate
        by_itself = self.evaluates and (self.task is not None or evaluate.patience is not None)
        by_itself = by_itself or given.get("save_strategy") == "best"
        return given.pop("load_best_model_at_end", by_itself) and given.get("eval_strategy", "no") != "no"

    def predict(self, trainer: QwenVLTrainer, when: str):
        """Replies to the first evaluation samples, by the main process while the others wait; or the task's score."""
        self.phases.begin("evaluate")
        evaluate = self.recipe.evaluate
        if self.task is not None:
            self.score(trainer, when)
        elif self.is_main and evaluate.predictions:
            write_predictions(
                trainer.accelerator.unwrap_model(trainer.model),
                trainer.collators["eval"],
                shown_samples(self.samples["eval"], self.checked["eval"], evaluate.predictions),
                run=self.run.path,
                when=when,
                max_new_tokens=evaluate.max_new_tokens,
            )
        trainer.accelerator.wait_for_everyone()

    def score(self, trainer: QwenVLTrainer, when: str):
        """The task's score before training, which is logged as step 0, or of the result."""
        score = self.task.score_of(trainer)
        if when == "before":
            trainer.log(score.metrics())
        if self.is_main:
            self.description["score"] = score.added_to(self.description.get("score", {}), when)
            self.run.write_run(self.description)
            self.task.write_predictions(score, self.recipe.evaluate.predictions, self.run.path, when)

    # Afterwards

    def save_result(self, trainer: QwenVLTrainer):
        """The adapter in PEFT's format with its base noted beside it; or, trained in full, the whole checkpoint."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self.is_main:
            self.result = self.run.adapter if isinstance(model, PeftModel) else self.run.path / "model"
            with writing(self.result) as partial:
                model.save_pretrained(partial)
                if isinstance(model, PeftModel):
                    write_base(partial, self.recipe.model.path, self.base_fingerprint, quantize=self.quantized)
                else:
                    self.processor.save_pretrained(partial)
        trainer.accelerator.wait_for_everyone()

    def finish(self, trainer: QwenVLTrainer, seconds: float):
        if not self.is_main:
            return
        self.description |= {
            "status": "finished",
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_seconds": round(seconds, 1),
            "phases": self.phases.record(),
            "steps": trainer.state.global_step,
            "best_checkpoint": trainer.state.best_model_checkpoint,
        }
        self.run.write_run(self.description)
        report = write_report(self.run.path)
        for line in summary(
            self.task.without_scores(trainer.state.log_history) if self.task else trainer.state.log_history,
            wall_seconds=seconds,
            run=self.run.path,
            tokens=trainer.throughput.all_tokens,
            images=trainer.throughput.all_images,
        ):
            self.say(line)
        if self.task is not None:
            self.say(score_line(self.description["score"]))
        state, of_step = trainer.state, ""
        if trainer.args.load_best_model_at_end and state.best_global_step not in (None, state.global_step):
            of_step = f", of step {state.best_global_step}: the best {trainer.args.metric_for_best_model}"
        self.say(f"{'adapter' if self.result == self.run.adapter else 'model':<11} {self.result}{of_step}")
        self.say(f"report      {report}")
        self.say("Next:")
        self.say("  look     open the report in a browser")
        self.say(f"  use      finetune chat {self.run.path} --image IMAGE")
        if self.result == self.run.adapter:
            self.say(f"  merge    finetune merge {self.run.path} --to MODEL")
        self.say("  go on    copy the recipe, put your own data and checkpoint in, and run it the same way")
