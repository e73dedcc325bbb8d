"""The SFT trainer: TRL's, with packing, a loss that is exact over the whole step, and complete checkpoints."""

import contextlib
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import AutocastKwargs
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl import SFTConfig

from finetune.batches.attempt import OutOfMemory
from finetune.batches.collate import LEFT_OUT, NO_SAMPLE, Collator
from finetune.data.epoch_draw import EpochDraws
from finetune.data.loader_workers import ignore_signals_from_others
from finetune.errors import Failed
from finetune.evaluation.task_evaluation import TaskScore, TaskScorer
from finetune.memory.out_of_memory import Batch, DoesNotFit, PackBudget
from finetune.model.adapters import TrainableModel
from finetune.model.masters import rounded_masters
from finetune.model.parameter_groups import parameter_groups
from finetune.model.step_loss import forward_with_loss
from finetune.run.folder import RunFolder
from finetune.run.left_out import LeftOut
from finetune.training.checkpointing_trainer import CheckpointingTrainer
from finetune.training.epoch_sampler import EpochSampler, SharedEpochSampler
from finetune.training.equal_packs import Fillers, equalize
from finetune.training.evaluation_loss import loss_metrics, sum_losses
from finetune.training.loss_scale import LossScale, skip_on_host
from finetune.training.processes import average_gradients, stop_together
from finetune.training.random_states import random_states_kept
from finetune.training.step_in_packs import StepInPacks
from finetune.training.throughput import Throughput
from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration
from qwenvl.checkpoint.record import ModelRecord


class NonFiniteLoss(Failed):
    """The loss is NaN or infinite; the message names the samples."""


class QwenVLTrainer(CheckpointingTrainer):
    """TRL's trainer over samples that are rendered, decoded and packed when they are needed.

    One optimizer step is `per_device_train_batch_size x gradient_accumulation_steps x processes` samples. Its loss is
    the sum over all their supervised tokens divided by the number of these, however the samples are cut into packs.

    Args:
        model: its trained parameters require gradients.
        args: TRL's configuration.
        collators: for "train" and, where there is evaluation, "eval".
        indices: for the same names, the samples to use, as indices into the collator's samples.
        run: the folder that checkpoints are written to.
        left_out: notes samples whose images cannot be decoded, or refuses them; None refuses them.
        record: what the model is trained as, written into each checkpoint; None writes none.
        tokens_per_batch: tokens of one forward; None runs every sequence by itself. A pack that does not fit into the
            memory lowers it (see `step_in_packs`).
        out_of_memory: what earlier parts of a resumed run noted in run.json about packs that did not fit.
        learning_rates, vision_layer_decay, loraplus_lr_ratio: see `parameter_groups`.
        shuffle: draw a new order of the training samples in each epoch.
        draws: which of the training samples in `indices` each epoch has; None takes all of them in each.
        task_scorer: scores replies at each evaluation, besides the loss; None evaluates the loss alone.
        callbacks: Transformers' callbacks, besides its own.
        optimizer: in place of the one that `args.optim` names.
    """

    def __init__(
        self,
        model: TrainableModel,
        args: SFTConfig,
        *,
        collators: dict[str, Collator],
        indices: dict[str, Sequence[int]],
        run: RunFolder,
        left_out: LeftOut | None = None,
        record: ModelRecord | None = None,
        tokens_per_batch: int | None,
        out_of_memory: Sequence[Mapping[str, Any]] = (),
        learning_rates: dict[str, float | None] | None = None,
        vision_layer_decay: float | None = None,
        loraplus_lr_ratio: float | None = None,
        shuffle: bool = True,
        draws: EpochDraws | None = None,
        task_scorer: TaskScorer | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self.collators = collators
        self.run = run
        self.left_out = left_out or LeftOut(None, "error")
        self.record = record
        self.train_budget = PackBudget("tokens_per_batch", tokens_per_batch, out_of_memory)
        # Evaluation keeps no activations. If it runs out of memory, training need not have smaller packs.
        self.eval_budget = PackBudget("evaluation_tokens_per_batch", tokens_per_batch, out_of_memory)
        self.step_in_packs = None
        self.learning_rates = learning_rates or {}
        self.vision_layer_decay, self.loraplus_lr_ratio = vision_layer_decay, loraplus_lr_ratio
        self.shuffle = shuffle
        self.epoch_sampler = None if draws is None else EpochSampler(draws, indices["train"], args.seed, shuffle)
        self.shared_sampler: SharedEpochSampler | None = None
        self.task_scorer = task_scorer
        self.throughput = Throughput()

        self._supervised = 0
        self._failure: NonFiniteLoss | None = None
        datasets = {name: Dataset.from_dict({"sample": list(rows)}) for name, rows in indices.items()}
        self.train_samples = len(indices["train"])
        if args.world_size > 1:  # behind them, the empty place
            datasets["train"] = Dataset.from_dict({"sample": [*indices["train"], NO_SAMPLE]})
        config = self._config_of(model)
        use_cache = config.use_cache
        super().__init__(
            model=model,
            args=args,
            data_collator=collators["train"],
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("eval"),
            processing_class=collators["train"].tokenizer,
            callbacks=list(callbacks),
            optimizers=(optimizer, None),
        )
        # Transformers turns it off, and a saved model would then generate without a cache.
        config.use_cache = use_cache
        self.loss_scale = LossScale(self.accelerator) if args.fp16 else None
        self.share_model()
        self.obey(callbacks)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        # `bf16` and `fp16` round weights, or scale the loss: what the model computes in is for its own code to say.
        return super()._build_accelerator_args(**kwargs) | {"kwargs_handlers": [AutocastKwargs(enabled=False)]}

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """To be entered for every forward, with its backward: see `masters.rounded_masters`."""
        assert self.model is not None
        # What is sharded is rounded where it is gathered, by FSDP2's policy or DeepSpeed.
        return rounded_masters(self.model, None if self._is_sharded else self.rounds_to)

    @staticmethod
    def _config_of(model: nn.Module) -> QwenVLConfig:
        config = model.config
        assert isinstance(config, QwenVLConfig)
        return config

    def _send_telemetry(self) -> None:
        """Sends nothing: a run makes no connection that its recipe does not ask for."""

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # Transformers sets the model's stop tokens to the tokenizer's one; a reply has three.
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        assert isinstance(model, QwenVLForConditionalGeneration)
        settings = copy.deepcopy(model.generation_config)
        self.step_in_packs = None
        try:
            return super().train(*args, **kwargs)
        finally:
            model.generation_config = settings

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        samples = range(self.train_samples)
        if self.args.world_size == 1 or self.args.dataloader_drop_last:
            if self.epoch_sampler is not None:
                return self.epoch_sampler
            # Accelerate replaces the random one by one seeded from the seed and the epoch.
            return RandomSampler(samples) if self.shuffle else SequentialSampler(samples)
        order: EpochSampler | SeedableRandomSampler | SequentialSampler
        if self.epoch_sampler is not None:
            order = self.epoch_sampler
        elif self.shuffle:
            order = SeedableRandomSampler(samples, data_seed=self.args.data_seed)
        else:
            order = SequentialSampler(samples)
        self.shared_sampler = SharedEpochSampler(
            order, self.args.train_batch_size * self.args.world_size, empty=self.train_samples
        )
        return self.shared_sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # Not by the loader's `set_epoch`, which does not reach a sampler behind those that skip and share batches.
        for sampler in (self.epoch_sampler, self.shared_sampler):
            if sampler is not None:
                sampler.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        loader: Any = super()._get_dataloader(*args, **kwargs)
        with_workers = loader.base_dataloader  # Accelerate's wrapper starts no workers itself
        with_workers.worker_init_fn = partial(ignore_signals_from_others, then=with_workers.worker_init_fn)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        # Each sample once, whatever training does: processes with fewer samples do not repeat others, none is dropped.
        loading, args = self.accelerator.dataloader_config, self.args
        before = self.data_collator, loading.even_batches, args.dataloader_drop_last
        self.data_collator, loading.even_batches, args.dataloader_drop_last = self.collators["eval"], False, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator, loading.even_batches, args.dataloader_drop_last = before

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        assert model is not None
        if self.optimizer is None:
            decaying = set(self.get_decay_parameter_names(model))
            groups = parameter_groups(
                model,
                learning_rate=self.args.learning_rate,
                learning_rates=self.learning_rates,
                vision_layer_decay=self.vision_layer_decay,
                loraplus_lr_ratio=self.loraplus_lr_ratio,
                weight_decay=self.args.weight_decay,
                no_decay={name for name, _ in model.named_parameters()} - decaying,
            )
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(
                self.args,
                model,  # type: ignore[arg-type]  # what is wrapped for FSDP is no PreTrainedModel
            )
            self.optimizer = optimizer_class(groups, **arguments)
        assert self.optimizer is not None
        if self.args.fp16:
            skip_on_host(self.optimizer)
        return self.optimizer

    # Loss

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of one batch, pack by pack; returns its part of the step's loss."""
        model.train()
        self._note_left_out("train", inputs)
        if num_items_in_batch is not None:
            self._supervised = self._supervised + num_items_in_batch
        if self.step_in_packs is None:
            self.train_budget.reach(self.state.global_step + 1)
            self.step_in_packs = StepInPacks(
                self.train_budget,
                run_pack=partial(self._forward_backward, model, num_items_in_batch),
                empty_gradients=model.zero_grad,
                refuse=partial(self._refuse_out_of_memory, "train"),
                can_repeat=not self._is_sharded,
                equalize=self._equalize if self._is_sharded else None,
                # Where the model is sharded, the others wait for this process in each forward.
                is_abandoned=lambda: self.stop.is_received and not self._is_sharded,
                device=self.args.device,
            )
        total = self.step_in_packs.run(inputs)
        if self._is_sharded:
            stop_together(self._failure, self.args.device)
        self.agree_on_the_step()
        if self.accelerator.sync_gradients:
            self.step_in_packs = None
            if isinstance(model, DistributedDataParallel):
                average_gradients(model.parameters())
            elif self.is_deepspeed_enabled:
                self.deepspeed.step()
        self.throughput.count(inputs)
        return total

    def _forward_backward(
        self, model: nn.Module, num_items_in_batch: torch.Tensor | int | None, pack: Batch, is_last: bool
    ) -> torch.Tensor:
        """Forward and backward of one pack; returns its part of the step's loss."""
        without_sync: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if isinstance(model, DistributedDataParallel):
            # Not through the wrapper, which would all-reduce during the backward: see `processes.average_gradients`.
            model = model.module
        elif isinstance(model, FSDPModule):
            # Transformers defers it to the last batch of a step, with the gradients of all weights on each process.
            model.set_requires_gradient_sync(True)
        elif not self.is_deepspeed_enabled and not (is_last and self.accelerator.sync_gradients):
            without_sync = self.accelerator.no_sync(model)
        pack = self._prepare_inputs(pack)
        with self.computing(), without_sync:
            loss = self.compute_loss(model, pack, num_items_in_batch=num_items_in_batch)
            self._refuse_non_finite(loss, pack)
            self.backward(loss, is_last=is_last)
        return loss.detach()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the cross-entropy summed over the supervised tokens, divided by `num_items_in_batch` (of all
        processes); with `return_outputs` a pair of it and the model's output."""
        # None are supervised where all samples of a step were left out: its loss is 0.
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        elif num_items_in_batch is not None:
            num_items_in_batch = max(num_items_in_batch, 1)
        outputs = forward_with_loss(model, self.accelerator.unwrap_model(self.model), inputs, num_items_in_batch)
        loss = outputs.loss
        if num_items_in_batch is not None and model.training:
            # The items are counted over all processes, and gradients are averaged over processes.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _equalize(self, packs: list[Batch]) -> list[Batch]:
        assert self.model is not None
        tokenizer = self.collators["train"].tokenizer
        return equalize(packs, Fillers.of(self._config_of(self.model), tokenizer.eod_id), self.args.device)

    def _refuse_non_finite(self, loss: torch.Tensor, pack: Batch) -> None:
        if torch.isfinite(loss):
            return
        failure = NonFiniteLoss(
            f"the loss is {loss.item()} at step {self.state.global_step + 1}, on {self._origins('train', pack)}. Look "
            "at these rows; if they are fine, lower train.learning_rate, or use model.dtype: bfloat16 or float32"
        )
        if not self._is_sharded:
            raise failure
        self._failure = self._failure or failure  # the others wait for this process in the backward

    def _origins(self, name: str, pack: Batch) -> str:
        """File and row of each sample of a pack."""
        samples = self.collators[name].samples
        return "; ".join(str(samples[index].origin) for index in pack["samples"].tolist() if index != NO_SAMPLE)

    def _note_left_out(self, name: str, batch: Batch) -> None:
        """Take what a batch had to leave out from it, and note it.

        Raises:
            UserError: the recipe refuses such samples.
        """
        for index, origin, reason in batch.pop(LEFT_OUT, ()):
            self.left_out.meet(name, index, origin, reason)

    def _refuse_out_of_memory(self, name: str, pack: Batch, failure: OutOfMemory) -> NoReturn:
        images = int(pack["sequence_images"].sum())
        raise DoesNotFit(
            what=f"{self._origins(name, pack)} ({pack['input_ids'].numel():,} tokens, {images} images)",
            when=f"in evaluation after step {self.state.global_step}"
            if name == "eval"
            else f"at step {self.state.global_step + 1}",
            conversations=len(pack["sequence_lengths"]),
            tokens=pack["input_ids"].numel(),
            said=failure.said,
            shared=self._is_sharded,
        )

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `_evaluate_in_place`, with the random state put back: even making a data loader draws a number."""
        with random_states_kept(self.args.device), self.computing():
            return self._evaluate_in_place(eval_dataset, metric_key_prefix)

    def _evaluate_in_place(self, eval_dataset: Any, metric_key_prefix: str) -> dict[str, float]:
        """Return the mean loss over all supervised tokens of the evaluation samples, and the task's score if any.

        In eval mode the model stretches positions beyond `seq_length` (see `model.rotary`); in training it does not.
        `eval_long_samples` counts the samples on which this loss is therefore not the training objective.
        """
        start = time.monotonic()
        assert self.model is not None
        model = self._wrap_model(self.model, training=False)
        model.eval()
        config = self._config_of(self.model)
        sums = sum_losses(
            self._eval_batches(eval_dataset),
            partial(self._loss_of_pack, model),
            self.eval_budget,
            partial(self._refuse_out_of_memory, "eval"),
            seq_length=config.seq_length,
            device=self.args.device,
            fillers=Fillers.of(config, self.collators["eval"].tokenizer.eod_id) if self._is_sharded else None,
            is_abandoned=lambda: self.stop.is_received,
        )
        self.stop.abandon_if_received()
        sums = self.accelerator.reduce(sums, reduction="sum")
        self._log_news(self.eval_budget.take_news(self.args.device))
        metrics: dict[str, Any] = loss_metrics(sums, metric_key_prefix, self.left_out.file)
        if self.task_scorer is not None:
            metrics |= self._task_score(self.task_scorer).metrics()
        metrics[f"{metric_key_prefix}_seconds"] = round(time.monotonic() - start, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _eval_batches(self, eval_dataset: Any) -> Iterator[Batch]:
        for batch in self.get_eval_dataloader(eval_dataset):
            self._tick()
            self._note_left_out("eval", batch)
            yield batch

    def _loss_of_pack(self, model: nn.Module, pack: Batch) -> torch.Tensor:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(pack), num_items_in_batch=1)

    def _task_score(self, scorer: TaskScorer) -> TaskScore:
        model = self.accelerator.unwrap_model(self.model)
        return scorer.evaluate(
            model,
            self.accelerator,
            self.state.global_step,
            bar=False,
            tick=self._tick,
            is_abandoned=lambda: self.stop.is_received,
            agree=self.stop.abandon_if_received,
        )

    def _tick(self) -> None:
        self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # The step is done and not saved yet.
        self._log_news(self.train_budget.take_news(self.args.device))
        if self.loss_scale is not None:
            self._log_news(self.loss_scale.take_news(self.state.global_step))
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _log_news(self, news: dict[str, float] | None) -> None:
        if news is not None:
            # A log clears the flag that asks for the step's own log.
            should_log = self.control.should_log
            self.log(news)
            self.control.should_log = should_log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if not self._supervised:
                # All samples were left out. A loss of 0 would look like one that was learned.
                del logs["loss"]
            self._supervised = 0
            logs |= self.throughput.since_last(self.args.device)
        # Not SFTTrainer's, which adds figures of its own loss.
        Trainer.log(self, logs, start_time)
