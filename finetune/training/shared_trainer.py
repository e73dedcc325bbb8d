"""TRL's trainer over a model that processes may share by FSDP2.

Transformers' trainer shares the model when training begins, saves what this process has, and reads only what it saved
in the same way. Here the model is shared before anything is computed with it (`sharded_model`), and each kind of
checkpoint is read in each way of training (`sharded_checkpoint`).
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from transformers.trainer import SCHEDULER_NAME
from trl import SFTTrainer

from finetune.model.adapters import TrainableModel, without_adapter
from finetune.training.rng_states import own_random_state
from finetune.training.sharded_checkpoint import (
    OPTIMIZER,
    bare,
    gather_optimizer,
    is_sharded,
    load_sharded_optimizer,
    load_sharded_weights,
    load_whole_optimizer,
    load_whole_weights,
    save_shards,
)
from finetune.training.sharded_model import gather, share
from qwenvl import QwenVLForConditionalGeneration


class SharedTrainer(SFTTrainer):
    """Where Accelerate's plugin is FSDP2's, `share_model` is called once the trainer is made."""

    @property
    def shares_model(self) -> bool:
        """Whether processes share the model by FSDP2."""
        return self.accelerator.is_fsdp2

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def _trained(self) -> TrainableModel:
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, QwenVLForConditionalGeneration | PeftModel)
        return model

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        assert self.optimizer is not None, "asked for when training has begun"
        return bare(self.optimizer)

    def share_model(self) -> None:
        """Give each process its part, where the plugin says so; before anything is computed."""
        if not self.shares_model:
            return
        model, optimizer = share(self.accelerator, self._trained, self.create_optimizer())
        self.model = self.model_wrapped = model
        self.optimizer = optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> Any:
        if not self.shares_model:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.create_scheduler(num_training_steps=max_steps)
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model, train_dataloader

    # What is written

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, whole if it is an adapter; a collective call where processes share it.

        Of a model trained in full, `_save_optimizer_and_scheduler` writes the weights: here are its settings.
        """
        if not self.shares_model:
            super().save_model(output_dir, _internal_call)
        elif isinstance(self.model, PeftModel):
            self._save(output_dir, gather(self._trained, is_main=self._is_main, trained_only=True))
        elif self._is_main:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            model = without_adapter(self._trained)
            model.config.save_pretrained(folder)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(folder)
            assert isinstance(self.processing_class, PreTrainedTokenizerBase)
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.shares_model:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder, optimizer = Path(output_dir), self._bare_optimizer
        if isinstance(self.model, PeftModel):
            state = gather_optimizer(optimizer, is_main=self._is_main)
            if self._is_main:
                torch.save(state, folder / OPTIMIZER)
        else:
            self.accelerator.wait_for_everyone()  # until the main process has made the folder
            save_shards(folder, self._trained, optimizer, is_main=self._is_main)
        if self._is_main:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    # What is read

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if is_sharded(folder):
            load_sharded_weights(folder, self._trained)
        elif self.shares_model:
            load_whole_weights(folder, self._trained, is_main=self._is_main)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, optimizer = Path(checkpoint), self._bare_optimizer
        if is_sharded(folder):
            load_sharded_optimizer(folder, self._trained, optimizer)
        elif self.shares_model:
            load_whole_optimizer(folder, optimizer, is_main=self._is_main)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and (self.shares_model or is_sharded(best)):
            self._load_from_checkpoint(best)
        else:
            super()._load_best_model()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The random state of this process; where the checkpoint is of fewer processes, that of another one."""
        if checkpoint is None:
            return
        with own_random_state(Path(checkpoint), self.args.process_index, self.args.world_size) as folder:
            super()._load_rng_state(str(folder))
