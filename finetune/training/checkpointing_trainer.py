"""Checkpoints of the trainer: complete or absent, with all that a resume needs, from one process or several."""

import contextlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from finetune.files.checkpoint_folder import say_dtype
from finetune.model.adapters import write_plain_config
from finetune.run.checkpoints import checkpoint_path, prune, verify, writing
from finetune.run.left_out import LeftOut
from finetune.training.checkpoint_note import passing_checkpoints
from finetune.training.resumable_trainer import ResumableTrainer
from qwenvl.checkpoint.adapter_files import ADAPTER_CONFIG
from qwenvl.checkpoint.record import ModelRecord, write_record


class CheckpointingTrainer(ResumableTrainer):
    """Writes checkpoints into the run folder, and removes those that are not kept.

    Attributes:
        record: what the model is trained as, written into each checkpoint; None writes none.
        left_out: notes samples whose images cannot be decoded.
        shares_folder: whether all processes see the run folder.
    """

    record: ModelRecord | None
    left_out: LeftOut
    shares_folder: bool = True

    @property
    def _is_sharded(self) -> bool:
        """Whether the model is sharded over processes, so that every forward waits for the others."""
        return self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    @property
    def rounds_to(self) -> torch.dtype | None:
        """The 16-bit dtype that float32 masters are computed in and saved as a model; None of an adapter, or without
        masters."""
        if isinstance(self.model, PeftModel):
            return None
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the base class's, with the record of what the model is trained as."""
        super().save_model(output_dir, _internal_call)
        if self.record is not None and self.args.should_save:
            write_record(output_dir or str(self.args.output_dir), self.record)
        if self.rounds_to is not None and self.args.should_save:
            say_dtype(Path(output_dir or str(self.args.output_dir)), self.rounds_to)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the base class's, but complete or absent: written under another name, synced, hashed, then renamed."""
        step = self.state.global_step
        self.gather_left_out()
        note = self.resumption.note()
        final = checkpoint_path(self.run.checkpoints, step)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.saves.measured())
            partial = self._from_main_process(stack.enter_context(writing(final)) if self.args.should_save else None)
            if not (self.shares_folder or self.args.should_save):
                partial = Path(stack.enter_context(TemporaryDirectory()))
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
                if (partial / ADAPTER_CONFIG).is_file():
                    write_plain_config(partial)
                self._write_best_checkpoint(partial / TRAINER_STATE_NAME)
                note.write(partial)
        self._name_best_checkpoint()
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            passing = passing_checkpoints(self.run.checkpoints)
            prune(self.run.checkpoints, self.args.save_total_limit, {Path(best)} if best else set(), passing)
        self.accelerator.wait_for_everyone()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if not self.shares_folder:
            states = gather_object(
                [(file.name, file.read_bytes()) for file in Path(output_dir).glob("rng_state_*.pth")]
            )
            for name, content in states if self.args.should_save else ():
                Path(output_dir, name).write_bytes(content)

    @property
    def takes_over_result(self) -> bool:
        """Whether processes may end with different weights: the best checkpoint's, where they find it, or the last."""
        return not (self.shares_folder or self._is_sharded) and bool(self.args.load_best_model_at_end)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # Transformers forgets the name in a process that does not see the run folder, which then would not take part.
        self._name_best_checkpoint()
        return super()._finalize_training(*args, **kwargs)

    def _load_best_model(self) -> None:
        """As the base class's, which would go on with the last step's weights if the checkpoint was gone.

        Raises:
            DamagedCheckpoint: it is gone, or not as it was saved; in the main process.
        """
        if self.args.should_save:
            assert self.state.best_model_checkpoint is not None, "asked for where there is one"
            verify(self.state.best_model_checkpoint)
        super()._load_best_model()

    def _name_best_checkpoint(self) -> None:
        """Set the best checkpoint's final name in all processes: Transformers has that of the folder being written."""
        best = self.state.best_global_step
        self.state.best_model_checkpoint = str(checkpoint_path(self.run.checkpoints, best)) if best else None

    def _write_best_checkpoint(self, state_file: Path) -> None:
        """Write its name into a saved trainer state."""
        self._name_best_checkpoint()
        state = json.loads(state_file.read_text())
        state["best_model_checkpoint"] = self.state.best_model_checkpoint
        state_file.write_text(json.dumps(state, indent=2) + "\n")

    def _from_main_process(self, value: Any) -> Any:
        if self.accelerator.num_processes == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gather_left_out(self) -> None:
        """Tell all processes what each has left out; a collective call."""
        if self.accelerator.num_processes > 1:
            others = gather_object([self.left_out.found])
            # The others know it too: all log the same counts.
            self.left_out.join(others if self.args.should_save else ())
            for found in others:
                self.left_out.found |= found
