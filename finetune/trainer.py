"""The SFT trainer: TRL's, with packing, a loss that is exact over the whole step, and complete checkpoints."""

import contextlib
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.data import RandomSampler, SequentialSampler
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from finetune.adapters import parameter_groups
from finetune.checkpoints import checkpoint_path, prune, writing
from finetune.collate import Collator
from finetune.errors import Failed
from finetune.packing import split_batch
from finetune.run import RunFolder
from finetune.task_evaluation import TaskEvaluation, TaskScore
from qwenvl.chat import IGNORED
from qwenvl.loss import SummedCrossEntropy


class NonFiniteLoss(Failed):
    """The loss is NaN or infinite; the message names the samples it came from."""


class QwenVLTrainer(SFTTrainer):
    """Trains on samples by index: they are rendered, decoded and packed as they are needed.

    One optimizer step is `per_device_train_batch_size x gradient_accumulation_steps x processes` samples. Its loss is
    the sum over all their supervised tokens divided by their number, however they are cut into packs.

    Args:
        model: the model, with what shall be trained requiring gradients.
        args: TRL's configuration.
        collators: for "train" and, where there is evaluation, "eval".
        indices: for the same names, the samples to use, as indices into the collator's samples.
        run: where checkpoints go.
        tokens_per_batch: tokens of one forward; None runs every sequence by itself.
        learning_rates, vision_layer_decay: see `adapters.parameter_groups`.
        shuffle: draw the order of the training samples anew each epoch.
        task_evaluation: scores replies at each evaluation, besides the loss; None does not.
        callbacks: Transformers' callbacks, besides its own.
    """

    def __init__(
        self,
        model: nn.Module,
        args: SFTConfig,
        *,
        collators: dict[str, Collator],
        indices: dict[str, Sequence[int]],
        run: RunFolder,
        tokens_per_batch: int | None,
        learning_rates: dict[str, float | None] | None = None,
        vision_layer_decay: float | None = None,
        shuffle: bool = True,
        task_evaluation: TaskEvaluation | None = None,
        callbacks: Sequence[Any] = (),
    ):
        self.collators = collators
        self.run = run
        self.tokens_per_batch = tokens_per_batch
        self.learning_rates = learning_rates or {}
        self.vision_layer_decay = vision_layer_decay
        self.shuffle = shuffle
        self.task_evaluation = task_evaluation
        self.throughput = Throughput()
        datasets = {name: Dataset.from_dict({"sample": list(rows)}) for name, rows in indices.items()}
        super().__init__(
            model=model,
            args=args,
            data_collator=collators["train"],
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("eval"),
            processing_class=collators["train"].tokenizer,
            callbacks=list(callbacks),
        )

    def _send_telemetry(self):
        """Nothing is sent: a run makes no connection that its recipe does not ask for."""

    def train(self, *args, **kwargs):
        # Transformers aligns the model's stop tokens with the tokenizer's one; a reply has three.
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        settings = copy.deepcopy(model.generation_config)
        try:
            return super().train(*args, **kwargs)
        finally:
            model.generation_config = settings

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.shuffle:
            return SequentialSampler(dataset)
        # Accelerate replaces its generator by one seeded from seed and epoch, on every process alike.
        return RandomSampler(dataset)

    def get_eval_dataloader(self, eval_dataset=None):
        # Each sample once: processes with fewer do not get others' again, as they would in training.
        loading = self.accelerator.dataloader_config
        before = self.data_collator, loading.even_batches
        self.data_collator, loading.even_batches = self.collators["eval"], False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator, loading.even_batches = before

    def create_optimizer(self, model=None):
        model = self.model if model is None else model
        if self.optimizer is None:
            decaying = set(self.get_decay_parameter_names(model))
            groups = parameter_groups(
                model,
                learning_rate=self.args.learning_rate,
                learning_rates=self.learning_rates,
                vision_layer_decay=self.vision_layer_decay,
                weight_decay=self.args.weight_decay,
                no_decay={name for name, _ in model.named_parameters()} - decaying,
            )
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **arguments)
        return self.optimizer

    # Loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of one batch, pack by pack; returns its share of the step's loss."""
        model.train()
        packs = split_batch(inputs, self.tokens_per_batch)
        total = torch.zeros((), device=self.args.device)
        for number, pack in enumerate(packs, start=1):
            # Gradients are exchanged between processes once a batch, with its last pack.
            wait = contextlib.nullcontext() if number == len(packs) else self.accelerator.no_sync(model)
            pack = self._prepare_inputs(pack)
            with wait, self.maybe_activation_offload_context:
                loss = self.compute_loss(model, pack, num_items_in_batch=num_items_in_batch)
                self._refuse_non_finite(loss, pack)
                self.accelerator.backward(loss)
            total += loss.detach()
        self.throughput.count(inputs)
        return total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy summed over the supervised tokens, divided by `num_items_in_batch` (of all processes).

        Logits are computed at the supervised positions only.
        """
        labels = inputs["labels"]
        predicting = (labels[0, 1:] != IGNORED).nonzero()[:, 0]
        outputs = model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            pixel_values=inputs.get("pixel_values"),
            logits_to_keep=predicting,
            use_cache=False,
        )
        rows = torch.arange(len(predicting), device=labels.device)
        total = SummedCrossEntropy.apply(outputs.logits[0], rows, labels[0, predicting + 1])
        loss = total / (len(predicting) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.model.training:
            # The items are those of all processes, and gradients are averaged over them.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _refuse_non_finite(self, loss: torch.Tensor, pack: dict[str, torch.Tensor]):
        if torch.isfinite(loss):
            return
        samples = self.collators["train"].samples
        origins = [str(samples[index].origin) for index in pack["samples"].tolist()]
        raise NonFiniteLoss(
            f"the loss is {loss.item()} at step {self.state.global_step + 1}, on {'; '.join(origins)}. Look at these "
            "rows; if they are fine, lower train.learning_rate, or use model.dtype: bfloat16 or float32"
        )

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As `_evaluate_in_place`, and training goes on as if there had been none: a loader alone draws a number."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            return self._evaluate_in_place(eval_dataset, metric_key_prefix)

    def _evaluate_in_place(self, eval_dataset, metric_key_prefix: str) -> dict[str, float]:
        """Mean loss over all supervised tokens of the evaluation samples, and the task's score where there is one.

        In eval mode the model stretches positions beyond `seq_length` (see `qwenvl.rotary`), which training does not:
        `eval_long_samples` counts the samples on which this loss is therefore not the training objective.
        """
        start = time.monotonic()
        model = self._wrap_model(self.model, training=False)
        model.eval()
        # Sum of losses, supervised tokens, samples, samples beyond seq_length.
        sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        beyond = self.model.config.seq_length
        for batch in self.get_eval_dataloader(eval_dataset):
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            for pack in split_batch(batch, self.tokens_per_batch):
                pack = self._prepare_inputs(pack)
                with torch.no_grad():
                    loss = self.compute_loss(model, pack, num_items_in_batch=1)
                lengths = pack["sequence_lengths"]
                counts = [(pack["labels"] != IGNORED).sum(), len(lengths), (lengths > beyond).sum()]
                sums += torch.tensor([loss, *counts], dtype=torch.float64, device=sums.device)
        sums = self.accelerator.reduce(sums, reduction="sum")
        metrics = {
            f"{metric_key_prefix}_loss": (sums[0] / sums[1]).item(),
            f"{metric_key_prefix}_supervised_tokens": int(sums[1]),
            f"{metric_key_prefix}_samples": int(sums[2]),
            f"{metric_key_prefix}_long_samples": int(sums[3]),
        }
        if self.task_evaluation is not None:
            metrics |= self._task_score().metrics()
        metrics[f"{metric_key_prefix}_seconds"] = round(time.monotonic() - start, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _task_score(self) -> TaskScore:
        model = self.accelerator.unwrap_model(self.model)
        step = self.state.global_step
        return self.task_evaluation.evaluate(model, self.accelerator, step, bar=False, tick=self._tick)

    def _tick(self):
        self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.throughput.since_last(self.accelerator.num_processes, self.args.device)
        # Past SFTTrainer's, which adds figures of its own loss.
        Trainer.log(self, logs, start_time)

    # Checkpoints

    def _save_checkpoint(self, model, trial):
        """As the base class's, but complete or not there: written beside, synced, hashed, then renamed."""
        step = self.state.global_step
        final = checkpoint_path(self.run.checkpoints, step)
        with contextlib.ExitStack() as stack:
            partial = stack.enter_context(writing(final)) if self.args.should_save else None
            partial = self._from_main_process(partial)
            stack.callback(setattr, self.args, "output_dir", self.args.output_dir)
            self.args.output_dir = str(partial)
            # Not SFTTrainer's: it writes a model card into the output folder first.
            Trainer._save_checkpoint(self, model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                written = partial / f"{PREFIX_CHECKPOINT_DIR}-{step}"
                for file in sorted(written.iterdir()):
                    file.rename(partial / file.name)
                written.rmdir()
                self._name_best_checkpoint(partial / TRAINER_STATE_NAME)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = self.args.save_total_limit
            if keep is not None:
                prune(self.run.checkpoints, keep, {Path(best)} if best else set())
        self.accelerator.wait_for_everyone()

    def _name_best_checkpoint(self, state_file: Path):
        """The best checkpoint by the name that it has, or will have, in the run folder."""
        best = self.state.best_global_step
        self.state.best_model_checkpoint = str(checkpoint_path(self.run.checkpoints, best)) if best else None
        state = json.loads(state_file.read_text())
        state["best_model_checkpoint"] = self.state.best_model_checkpoint
        state_file.write_text(json.dumps(state, indent=2) + "\n")

    def _from_main_process(self, value: Any) -> Any:
        if self.accelerator.num_processes == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


class Throughput:
    """Tokens and images since the last log, for the figures of the live line."""

    def __init__(self):
        self.tokens = self.images = self.supervised = 0
        self.all_tokens = self.all_images = 0
        self.since = time.monotonic()

    def count(self, batch: dict[str, torch.Tensor]):
        """Add one collated batch of this process."""
        tokens, images = batch["input_ids"].numel(), int(batch["sequence_images"].sum())
        self.tokens += tokens
        self.images += images
        self.all_tokens += tokens
        self.all_images += images
        self.supervised += int((batch["labels"] != IGNORED).sum())

    def since_last(self, processes: int, device: torch.device) -> dict[str, float]:
        """Rates over all processes (taken to be alike) since the last call, and the peak memory so far."""
        seconds = max(time.monotonic() - self.since, 1e-9)
        figures = {
            "tokens_per_second": round(self.tokens * processes / seconds, 1),
            "images_per_second": round(self.images * processes / seconds, 2),
            "supervised_tokens": self.supervised * processes,
            "peak_memory_bytes": peak_memory(device),
        }
        self.tokens = self.images = self.supervised = 0
        self.since = time.monotonic()
        return figures


def peak_memory(device: torch.device) -> int:
    """Bytes: of the accelerator where there is one, else of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
