"""How training leaves off and goes on, so that a run that was stopped computes what an uninterrupted one does.

Transformers' trainer saves a step last of all: after its log and its evaluation, and once more after those at the end
of an epoch. A run that is stopped inside of a step or an evaluation saves the state after the last whole step, and
notes in the checkpoint what that step still owes. The resumed run does that first.
"""

import contextlib
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from transformers.trainer_utils import IntervalStrategy

from finetune.training.checkpoint_note import CheckpointNote, Owed, read_note
from finetune.training.random_states import RandomStates
from finetune.training.save_times import ends_epoch
from finetune.training.throughput import Amounts

if TYPE_CHECKING:
    from finetune.training.resumable_trainer import ResumableTrainer


@dataclass(frozen=True)
class WholeStep:
    """What the micro-batches of a step change before the step is done.

    Attributes:
        random: states of the generators.
        counted: tokens and images of this process.
        loss: (); sum of the losses of this process since the last log.
        flops: since the last log.
        supervised: tokens of all processes since the last log.
        tokens_seen: as Transformers counts them.
    """

    random: RandomStates
    counted: Amounts
    loss: torch.Tensor
    flops: int
    supervised: torch.Tensor | int
    tokens_seen: int


class Resumption:
    """Keeps track of what a trainer has done of its current step.

    Args:
        trainer: its own.
    """

    def __init__(self, trainer: "ResumableTrainer"):
        # A circle would keep the trainer, and the workers of its data loaders, until the garbage collector comes.
        self._trainer: ResumableTrainer = weakref.proxy(trainer)
        self._checkpoint: str | None = None  # that is resumed
        self._note: CheckpointNote | None = None  # of it
        self._begun = False
        self._step_ended = -1  # whose `after_step` was
        self._place: Owed = "step"
        self._owed: Owed | None = None
        self._whole: WholeStep | None = None
        self._saved: tuple[int, Owed | None] | None = None

    def resume_from(self, checkpoint: str | None) -> None:
        """Called before the training loop, with the checkpoint that its state is of."""
        self._checkpoint = checkpoint
        self._note = None if checkpoint is None else read_note(checkpoint)
        self._begun, self._step_ended = False, -1
        self._owed = self._whole = self._saved = None

    def begin(self) -> None:
        """Before the first epoch: go on with what the checkpoint notes, and do what its step owes. Later calls do
        nothing."""
        if self._begun:
            return
        self._begun = True
        trainer = self._trainer
        note = self._note or CheckpointNote()
        trainer.throughput.begin(note.totals, note.not_logged)
        if note.logged_step is not None:
            trainer._globalstep_last_logged = note.logged_step
            trainer._tr_loss += _own_part(note.losses, trainer.args.process_index, trainer.args.world_size)
            trainer._supervised = note.not_logged
        if self._note is not None:
            self._saved = (trainer.state.global_step, note.owed)
            self._pay(note.owed)
        self._whole = self._take()
        if trainer.state.global_step >= trainer.state.max_steps:
            # Transformers would train one step more where the last one is inside of an epoch.
            trainer.control.should_training_stop = True

    def _pay(self, owed: Owed | None) -> None:
        """Do what is owed, and save the step again."""
        if owed is None:
            return
        trainer = self._trainer
        trainer._load_rng_state(self._checkpoint)  # which is saved again with what is done here
        evaluates_again = owed == "step" or trainer.args.eval_strategy == IntervalStrategy.EPOCH
        if trainer.args.process_index == 0 and evaluates_again:
            trainer.run.forget_evaluation_of(trainer.state.global_step)  # logged, and killed before it was saved
        trainer.control.should_training_stop |= trainer.state.global_step >= trainer.state.max_steps
        rest = (trainer._tr_loss, None, trainer.model_wrapped, None, trainer.state.epoch, None, time.time())
        if owed == "step":
            trainer.control.should_evaluate = trainer.control.should_save = True
            trainer._maybe_log_save_evaluate(*rest)
        if owed == "epoch" or ends_epoch(trainer.state, trainer.control):
            self._step_ended = trainer.state.global_step
            trainer.control = trainer.callback_handler.on_epoch_end(trainer.args, trainer.state, trainer.control)
            trainer.control.should_save = True
            trainer._maybe_log_save_evaluate(*rest)

    @contextlib.contextmanager
    def after_step(self) -> Iterator[None]:
        """Around what is done after a step, and again at the end of an epoch."""
        step = self._trainer.state.global_step
        self._place = "epoch" if self._step_ended == step else "step"
        self._step_ended = step
        yield
        self._whole = self._take()

    @contextlib.contextmanager
    def owing_evaluation(self) -> Iterator[None]:
        """Around an evaluation. One that is abandoned is owed."""
        before, self._owed = self._owed, self._place
        yield
        self._owed = before

    def note(self) -> CheckpointNote:
        """The note of a checkpoint of now; a collective call."""
        trainer = self._trainer
        owed = self._owed
        if owed is None and self._place == "step" and ends_epoch(trainer.state, trainer.control):
            owed = "epoch"
        self._saved = (trainer.state.global_step, owed)
        loss = [float(trainer._tr_loss)]
        return CheckpointNote(
            owed=owed,
            passing=trainer.saves.passing,
            totals=trainer.throughput.totals(),
            not_logged=trainer.throughput.supervised_since_log(),
            losses=tuple(gather_object(loss) if trainer.args.world_size > 1 else loss),
            logged_step=trainer._globalstep_last_logged,
        )

    def leave(self) -> None:
        """End an abandoned training: save the state after the last whole step, if it is not saved."""
        trainer = self._trainer
        if self._owed is None and self._whole is not None:
            self._put_back(self._whole)
        trainer.step_in_packs = None
        trainer.model_wrapped.zero_grad()
        step = trainer.state.global_step
        if self._begun and step and self._saved != (step, self._owed):
            trainer.saves.stops()
            trainer._save_checkpoint(trainer.model_wrapped, None)
            trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)

    def _take(self) -> WholeStep:
        trainer = self._trainer
        return WholeStep(
            random=RandomStates(trainer.args.device),
            counted=trainer.throughput.counted,
            loss=trainer._tr_loss.clone(),
            flops=trainer.current_flos,
            supervised=trainer._supervised,
            tokens_seen=trainer.state.num_input_tokens_seen,
        )

    def _put_back(self, whole: WholeStep) -> None:
        trainer = self._trainer
        whole.random.restore()
        trainer.throughput.take_back(whole.counted)
        trainer._tr_loss = whole.loss
        trainer.current_flos = whole.flops
        trainer._supervised = whole.supervised
        trainer.state.num_input_tokens_seen = whole.tokens_seen


def _own_part(losses: tuple[float, ...], process: int, processes: int) -> float:
    """What this process had of the losses; of their mean, where there were others."""
    if len(losses) == processes:
        return losses[process]
    return sum(losses) / len(losses) if losses else 0.0
