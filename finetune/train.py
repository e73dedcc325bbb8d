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
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging
from trl import SFTConfig

from finetune.adapters import put_lora, train_in_full, trains_embeddings, trains_vision, trains_vision_only
from finetune.atomic_writes import write_text
from finetune.checkpoints import Found, clean_partials, find_last_good, writing
from finetune.collate import Collator
from finetune.components import count_parameters, table_of_parameters
from finetune.data.checking import Checked, check_samples
from finetune.data.samples import Samples
from finetune.data.summary import count_rows, describe_data, lines_left_out
from finetune.errors import Interrupted, UserError
from finetune.interrupts import StopOnSignal
from finetune.predictions import write_predictions
from finetune.progress import Progress, summary
from finetune.recipe import Recipe
from finetune.report import write_report
from finetune.run import RunFolder, check_disk_space, compare_runs, describe_environment
from finetune.trainer import QwenVLTrainer
from qwenvl import ImageAccess, QwenVLForConditionalGeneration, QwenVLProcessor, load_model
from qwenvl.fingerprint import weights_fingerprint, write_base
from qwenvl.loading import find_source

KEPT_CHECKPOINTS = 2
LEFT_OUT = "left_out.jsonl"

# What may change between the parts of one run without changing what it computes.
FREE_TO_CHANGE = (
    # The base is told by its fingerprint, wherever it lies.
    *("model.path", "output", "resume", "evaluate.predictions", "evaluate.max_new_tokens", "data.workers"),
    *(f"train.{key}" for key in ("logging_steps", "logging_strategy", "save_steps", "save_total_limit", "report_to")),
)


def train(recipe: Recipe, say: Callable[[str], None] = print) -> Path:
    """Train as the recipe says, or go on with a run that was interrupted.

    Args:
        recipe: the resolved recipe.
        say: prints a line; only the main process of a distributed run speaks.

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
        stop = stack.enter_context(StopOnSignal())
        road = _Road(recipe, run, is_main, say, stop)
        try:
            road.walk()
        except BaseException as error:
            road.note_end("interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed")
            raise
    return run.path


class _Road:
    """The steps of one run; each leaves what the next ones need."""

    def __init__(self, recipe: Recipe, run: RunFolder, is_main: bool, say: Callable[[str], None], stop: StopOnSignal):
        self.recipe = recipe
        self.run = run
        self.is_main = is_main
        self.say = say
        self.stop = stop
        self.notes: list[str] = []
        self.description: dict[str, Any] = {}

    def walk(self):
        started = time.monotonic()
        self.find_base()
        self.read_data()
        last = self.find_last_checkpoint()
        if last is None:
            return
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
        self.save_result(trainer)
        if self.evaluates:
            self.predict(trainer, "after")
        self.finish(trainer, time.monotonic() - started)

    def note_end(self, status: str):
        """Say in run.json how a run ended that did not finish."""
        if self.is_main and self.description:
            self.run.write_run({**self.description, "status": status})

    # Before anything heavy is loaded

    def find_base(self):
        model = self.recipe.model
        source = find_source(model.path)
        if source.adapter is not None:
            raise UserError(
                f"model.path: {model.path} is an adapter. Training starts from a checkpoint: give its base "
                f"({source.base}), or merge the adapter first"
            )
        if model.quantization != "none":
            raise UserError(f"model.quantization: {model.quantization} is not available in this version: use none")
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        self.base = source.base
        self.processor = QwenVLProcessor.from_pretrained(self.base)
        self.say(f"model       {model.path}")

    def read_data(self):
        recipe = self.recipe
        self.evaluates = recipe.evaluate is not None
        sources = {"train": recipe.data.train}
        if self.evaluates:
            sources["eval"] = recipe.evaluate.data
        access = ImageAccess(root=recipe.data.images_root, allow_urls=recipe.data.allow_urls)
        self.samples: dict[str, Samples] = {}
        self.checked: dict[str, Checked] = {}
        for name, part in sources.items():
            self.samples[name] = Samples(part, images_root=recipe.data.images_root, access=access)
            self.checked[name] = check_samples(
                self.samples[name],
                self.processor.tokenizer,
                max_length=recipe.data.max_length,
                n_queries=self.processor.n_queries,
                labels=recipe.data.labels,
                grounding=recipe.data.grounding,
                on_long=recipe.data.on_long,
                on_bad_row=recipe.data.on_bad_row,
                show_progress=self.is_main,
            )
            self.say(f"{name + ' data':<11} {describe_data(self.checked[name])}")

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
        stored = self.run.read_run()
        if self.is_main:
            clean_partials(self.run.path)
            clean_partials(self.run.checkpoints)
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
            self.run.forget_metrics_after(last.step)
        return last

    def describe_run(self):
        if not self.is_main:
            return
        self.run.write_recipe(self.recipe.to_yaml())
        self.description = {
            "status": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": self.recipe.model.path,
            "identity": self.identity,
            "environment": describe_environment(),
            "parameters": {
                name: {"trained": count.trained, "total": count.total} for name, count in self.parameters.items()
            },
            "rows": {name: count_rows(checked) for name, checked in self.checked.items()},
            "notes": self.notes,
        }
        self.run.write_run(self.description)
        left_out = [line for checked in self.checked.values() for line in lines_left_out(checked)]
        write_text(self.run.path / LEFT_OUT, "".join(left_out))

    # Model

    def load_model(self) -> QwenVLForConditionalGeneration | PeftModel:
        recipe = self.recipe
        set_seed(recipe.seed)
        model = load_model(recipe.model.path, dtype=choose_dtype(recipe.model.dtype))
        model.set_attn_implementation(recipe.model.attention)
        if is_random(model):
            self.notes.append(
                "The checkpoint's weights are random: it can show that training works, not that it reads."
            )
        if recipe.adapter is None:
            model = train_in_full(model, recipe.freeze)
        else:
            embeddings = trains_embeddings(recipe.adapter.train_embeddings, model)
            model = put_lora(model, recipe.adapter, recipe.freeze, embeddings=embeddings)
        without_images = int((self.checked["train"].images == 0).sum())
        if without_images and trains_vision_only(model):
            raise UserError(
                f"only the vision side is trained, and {without_images:,} of the samples have no image: they teach it "
                "nothing. Leave them out, or train the language model too"
            )
        self.parameters = count_parameters(model)
        for number, line in enumerate(table_of_parameters(self.parameters)):
            self.say(f"{'trained' if number == 0 else '':<11} {line}")
        for note in self.notes:
            self.say(f"note        {note}")
        return model

    # Training

    def make_trainer(self, model: QwenVLForConditionalGeneration | PeftModel) -> QwenVLTrainer:
        recipe, data = self.recipe, self.recipe.data
        collators = {
            name: Collator(
                samples,
                self.processor.tokenizer,
                self.processor.image_processor,
                data.labels,
                data.grounding,
                self.processor.n_queries,
            )
            for name, samples in self.samples.items()
        }
        arguments = self.trainer_arguments(model)
        trained = sum(count.trained for count in self.parameters.values())
        if self.is_main:
            # Weights and AdamW's two moments in float32, for each checkpoint kept and the one being written.
            check_disk_space(self.run.path, trained * 12 * ((arguments.save_total_limit or KEPT_CHECKPOINTS) + 1))
        self.progress = Progress(checkpoints=self.run.checkpoints)
        callbacks: list[TrainerCallback] = [self.stop, self.progress, WriteMetrics(self.run)]
        if self.evaluates and recipe.evaluate.patience is not None:
            callbacks.append(EarlyStoppingCallback(recipe.evaluate.patience))
        lengths = self.checked["train"].lengths
        budget = (data.tokens_per_batch or data.max_length or max(lengths)) if data.packing else None
        trainer = QwenVLTrainer(
            model,
            arguments,
            collators=collators,
            indices={name: checked.weighted_indices(recipe.seed) for name, checked in self.checked.items()},
            run=self.run,
            tokens_per_batch=budget,
            learning_rates=recipe.train.learning_rates and recipe.train.learning_rates.model_dump(),
            vision_layer_decay=recipe.train.vision_layer_decay,
            shuffle=data.shuffle,
            callbacks=callbacks,
        )
        drop_own_printers(trainer)
        return trainer

    def trainer_arguments(self, model: QwenVLForConditionalGeneration | PeftModel) -> SFTConfig:
        """The recipe's `train` section with what follows from the rest of the recipe."""
        given = dict(self.recipe.train_arguments())
        if self.evaluates:
            given.setdefault("eval_strategy", "epoch")
            if self.recipe.evaluate.patience is not None:
                given.setdefault("load_best_model_at_end", True)
        if given.get("load_best_model_at_end"):
            given.setdefault("metric_for_best_model", "eval_loss")
            given.setdefault("greater_is_better", False)
            # The best can only be kept if a checkpoint is saved at every evaluation.
            given.setdefault("save_strategy", given["eval_strategy"])
            if "eval_steps" in given:
                given.setdefault("save_steps", given["eval_steps"])
        return SFTConfig(
            **{"save_total_limit": KEPT_CHECKPOINTS, "report_to": "none", "logging_steps": 10, **given},
            output_dir=str(self.run.path),
            seed=self.recipe.seed,
            data_seed=self.recipe.seed,
            bf16=False,
            fp16=False,
            use_cpu=not torch.cuda.is_available(),
            max_length=None,
            packing=False,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            dataloader_num_workers=self.recipe.data.workers,
            label_names=["labels"],
            average_tokens_across_devices=True,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            # A batch of text alone leaves a trained vision side without gradients on one process.
            ddp_find_unused_parameters=trains_vision(model),
        )

    def predict(self, trainer: QwenVLTrainer, when: str):
        """Replies to the first evaluation samples, by the main process while the others wait."""
        evaluate = self.recipe.evaluate
        if self.is_main and evaluate.predictions:
            write_predictions(
                trainer.accelerator.unwrap_model(trainer.model),
                trainer.collators["eval"],
                self.checked["eval"].kept[: evaluate.predictions].tolist(),
                run=self.run.path,
                when=when,
                max_new_tokens=evaluate.max_new_tokens,
            )
        trainer.accelerator.wait_for_everyone()

    # Afterwards

    def save_result(self, trainer: QwenVLTrainer):
        """The adapter in PEFT's format with its base noted beside it; or, trained in full, the whole checkpoint."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self.is_main:
            self.result = self.run.adapter if isinstance(model, PeftModel) else self.run.path / "model"
            with writing(self.result) as partial:
                model.save_pretrained(partial)
                if isinstance(model, PeftModel):
                    write_base(partial, self.recipe.model.path, self.base_fingerprint)
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
            "steps": trainer.state.global_step,
            "best_checkpoint": trainer.state.best_model_checkpoint,
        }
        self.run.write_run(self.description)
        report = write_report(self.run.path)
        for line in summary(
            trainer.state.log_history,
            wall_seconds=seconds,
            run=self.run.path,
            tokens=trainer.throughput.all_tokens,
            images=trainer.throughput.all_images,
        ):
            self.say(line)
        self.say(f"{'adapter' if self.result == self.run.adapter else 'model':<11} {self.result}")
        self.say(f"report      {report}")
        self.say("Next:")
        self.say("  look     open the report in a browser")
        self.say(f"  use      python examples/describe_image.py --model {self.run.path} --image IMAGE QUESTION")
        self.say("  go on    copy the recipe, put your own data and checkpoint in, and run it the same way")


class WriteMetrics(TrainerCallback):
    """Every log of the trainer becomes a line of metrics.jsonl."""

    def __init__(self, run: RunFolder):
        self.run = run

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            epoch = round(state.epoch, 4) if state.epoch is not None else None
            self.run.append_metrics({"step": state.global_step, **logs, "epoch": epoch})


def choose_dtype(setting: str) -> str:
    """ "auto" is bfloat16 on a GPU that has it, float16 on one that has not, and as stored on the CPU."""
    if setting != "auto" or not torch.cuda.is_available():
        return setting
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def is_random(model: QwenVLForConditionalGeneration) -> bool:
    """Whether a checkpoint says of itself that its weights were never trained (`random_weights` in its config)."""
    return bool(getattr(model.config, "random_weights", False))


def drop_own_printers(trainer: QwenVLTrainer):
    """Transformers' printers would speak beside `Progress`."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
