"""TRL's trainer over a model that processes may share by DeepSpeed's ZeRO.

Transformers' trainer makes DeepSpeed's engine when training begins, and counts a backward as a batch. Here the engine
is made before anything is computed, and a batch may be several packs, each with a backward (`zero`).
"""

from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from finetune.training.shared_trainer import SharedTrainer
from finetune.training.zero import backward, gather_from_zero, share_by_zero, train_with


class ZeroTrainer(SharedTrainer):
    """Where Accelerate's plugin is DeepSpeed's, `share_model` is called once the trainer is made.

    Attributes:
        deepspeed: DeepSpeed's engine; None without it.
    """

    model: Any  # the base class's, which may be None
    deepspeed: Any

    def share_model(self) -> None:
        """Give each process its part, where a plugin says so; before anything is computed."""
        if not self.is_deepspeed_enabled:
            super().share_model()
            return
        self.deepspeed, self.optimizer = share_by_zero(self.accelerator, self.model, self.create_optimizer())
        self.model_wrapped = self.deepspeed

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        train_with(self.accelerator, self.deepspeed)
        self.create_scheduler(num_training_steps=max_steps)
        if resume_from_checkpoint is not None:
            # The frozen base of an adapter is not in its checkpoints.
            strict = not isinstance(self.model, PeftModel)
            deepspeed_load_checkpoint(self.deepspeed, resume_from_checkpoint, load_module_strict=strict)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.deepspeed, train_dataloader

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Backward of a pack.

        Args:
            is_last: whether it is the last pack of its batch.
        """
        if self.is_deepspeed_enabled:
            backward(self.deepspeed, loss, is_last=is_last and self.accelerator.sync_gradients)
        else:
            self.accelerator.backward(loss)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, whole; a collective call where processes share it."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
            return
        is_adapter = isinstance(self.model, PeftModel)
        values = gather_from_zero(self.model, is_main=self._is_main, trained_only=is_adapter)
        if self._is_main:
            self._save(output_dir, values)
        # The optimizer's states come next, into the folder that the main process has made.
        self.accelerator.wait_for_everyone()

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            Trainer._load_best_model(self)
        else:
            super()._load_best_model()
