"""SIGTERM and SIGINT: finish the step, save, and exit with the signal's code."""

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.errors import Interrupted


class StopOnSignal(TrainerCallback):
    """While training, a first signal saves a checkpoint after the current step and stops; a second stops at once.

    Outside training (loading, checking data, evaluating before the first step) any signal stops at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.training = False

    def __enter__(self) -> "StopOnSignal":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.training or self.received is not None:
            raise Interrupted(number, saved=False)
        self.received = number

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._any_process_received():
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = False

    def _any_process_received(self) -> bool:
        """All processes of a run stop after the same step, though the signal reaches them at different moments."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.received is not None
        number = torch.tensor(self.received or 0, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        if number and self.received is None:
            self.received = int(number)
        return bool(number)

    def raise_if_received(self) -> None:
        """Raises:
        Interrupted: a signal stopped the training.
        """
        if self.received is not None:
            raise Interrupted(self.received, saved=True)
