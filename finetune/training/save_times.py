"""Checkpoints at the end of each epoch and every some minutes, beside those that the recipe asks for by step.

What the clock says differs between processes: the main process decides, and the others hear of it where all processes
look for signals (`interrupts.StopOnSignal.agree`).
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SHARE = 0.05
"""The most of the time since training began that saves may take, before one that nobody asked for is put off."""

BYTES_PER_SECOND = 500e6
"""How fast a checkpoint is taken to be written and hashed, until the first is."""

_DUE, _AFFORDABLE = 1, 2


class SaveInTime(TrainerCallback):
    """Asks for checkpoints, or puts them off.

    A checkpoint at the end of an epoch, at TRL's default number of steps, or after `minutes` is put off while saves
    take more than `SHARE` of the time since training began. What is never put off: the steps or epochs that the recipe
    names, the best evaluation, the last step, and a stop. With `train.save_strategy: no` only a stop saves.

    At the last step of an epoch the state is saved once, after the evaluation at its end.

    Args:
        minutes: between two checkpoints; None saves at none for the time alone.
        asked: the recipe itself says when to save.
        never: it says not to.
        expected_bytes: of a checkpoint.
        clock: returns seconds, from any start.

    Attributes:
        passing: only the time or the end of an epoch asks for what is saved now, and the recipe says when to save: the
            next checkpoint takes its place.
    """

    def __init__(
        self,
        minutes: float | None,
        *,
        asked: bool = False,
        never: bool = False,
        expected_bytes: float = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._minutes, self._asked, self._never = minutes, asked, never
        self._clock = clock
        self._began = self._saved_at = clock()
        self._spent = 0.0
        self._longest = expected_bytes / BYTES_PER_SECOND
        self._put_off = False
        self._waits_for_epoch = False
        self._saved_step: int | None = None
        self._agreed = 0
        self.passing = False

    def wishes(self) -> int:
        """What the main process has to say at the end of a step, for `heard`."""
        now = self._clock()
        affordable = self._spent + self._longest <= SHARE * (now - self._began)
        due = self._minutes is not None and now - self._saved_at >= 60 * self._minutes
        return (_AFFORDABLE if affordable else 0) | (_DUE if affordable and (due or self._put_off) else 0)

    def heard(self, wishes: int) -> None:
        """Take the main process's wishes, in all processes."""
        self._agreed = wishes

    def stops(self) -> None:
        """What is saved now is what a stopped run goes on from."""
        self.passing = self._asked

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Count the time inside as that of a save."""
        began = self._clock()
        yield
        self._saved_at = self._clock()
        self._spent += self._saved_at - began
        self._longest = max(self._longest, self._saved_at - began) if self._saved_step else self._saved_at - began

    # --- what the trainer calls --------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = self._saved_at = self._clock()
        self._spent = 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        is_last = state.global_step >= state.max_steps
        by_step = control.should_save
        self.passing = False
        if self._never:
            return control
        if by_step and not (is_last or self._asked or self._agreed & _AFFORDABLE):
            self._put_off, control.should_save = True, False
        if not control.should_save and self._agreed & _DUE:
            control.should_save, self.passing = True, self._asked
        if control.should_save and ends_epoch(state, control):
            control.should_save, self._waits_for_epoch = False, True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        waits, self._waits_for_epoch = self._waits_for_epoch, False
        if control.should_save:
            self.passing = False
        elif self._saved_step == state.global_step and not control.should_evaluate:
            pass  # nothing has changed since
        elif waits:
            control.should_save = True
        elif not self._never:
            is_last = state.global_step >= state.max_steps or control.should_training_stop
            self.passing = self._asked and not is_last
            control.should_save = is_last or bool(self._agreed & _AFFORDABLE)
            self._put_off = not control.should_save
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved_step, self._put_off = state.global_step, False


def ends_epoch(state: TrainerState, control: TrainerControl) -> bool:
    """Whether what is done at the end of an epoch follows the step that was just done."""
    return control.should_training_stop or (state.epoch is not None and float(state.epoch).is_integer())
