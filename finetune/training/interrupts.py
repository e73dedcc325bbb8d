"""SIGTERM and SIGINT: abandon what is unfinished, save the last whole step, exit with the signal's code.

In training a signal is noted, and all processes look together at places where none of them waits for another: after
each micro-batch, and after the losses and the replies of an evaluation. There the unfinished step or evaluation is
abandoned (`Abandoned`). Between these places a process that has the signal itself makes nothing any more that would
be thrown away: no further packs, no further tokens of replies.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.errors import Interrupted
from finetune.run.agreement import largest_of_each

SIGNALS = (signal.SIGTERM, signal.SIGINT)

ONE_SIGNAL_SECONDS = 2.0
"""A signal that comes so soon after the first is the same one: a scheduler signals torchrun and the processes that it
started, and torchrun passes it on to them."""

GRACE_SECONDS = 10.0
"""How long a process that has nothing to save may take to end; torchrun kills after 30 seconds."""


class Abandoned(BaseException):
    """The step or evaluation that is under way is given up, in all processes: one of them has a signal.

    A BaseException, as `Interrupted` is: nothing that deals with bad input may take it for its own.
    """


class StopOnSignal(TrainerCallback):
    """While training, a first signal stops it at the next place where all processes look; a second stops at once.

    Outside training (loading, checking data, encoding images, evaluating before the first step or after the last) any
    signal stops at once. A process that waits for others cannot run Python's handlers: a thread ends it after
    `GRACE_SECONDS`.

    Attributes:
        received: the signal's number; None where this process has none.
        agreed: whether the processes have agreed that one of them has a signal. What they do together goes by this: a
            signal may come at any moment, and others would not know of it.
        saved_step: of the last checkpoint that this run has, written or resumed from; None where there is none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.agreed = False
        self.training = False
        self.saved_step: int | None = None
        self._step: int | None = None  # whole steps done; None before training
        self._first_at: float | None = None
        self._ended = threading.Event()
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "StopOnSignal":
        for number in SIGNALS:
            self._open.callback(signal.signal, number, signal.signal(number, self._handle))
        self._open.enter_context(_watching(self._watch))
        self._open.callback(self._ended.set)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._first_at is not None and time.monotonic() - self._first_at < ONE_SIGNAL_SECONDS:
            return
        self._first_at = time.monotonic()
        if not self.training or self.received is not None:
            raise self._interrupted(number, agreed=False)
        self.received = number

    def _watch(self, numbers: socket.socket) -> None:
        """In a thread: end this process if it does not end by itself."""
        first_at: float | None = None  # in training
        while byte := numbers.recv(1):
            if byte[0] not in SIGNALS:  # any signal with a handler in Python arrives here
                continue
            if self.training and (first_at is None or time.monotonic() - first_at < ONE_SIGNAL_SECONDS):
                first_at = first_at or time.monotonic()
                continue  # training ends by itself, however long it saves
            if not self._ended.wait(GRACE_SECONDS):
                said = self._interrupted(byte[0], agreed=False)
                print(f"interrupted by {said} while it waited for other processes", file=sys.stderr, flush=True)
                os._exit(said.exit_code)
            return

    @property
    def is_received(self) -> bool:
        """Whether this process has a signal: what it makes now will be thrown away."""
        return self.received is not None

    def agree(self, *numbers: int) -> list[int]:
        """Whether any process has a signal; a collective call.

        Args:
            numbers: of this process, that are agreed upon along with it.

        Returns:
            The largest of each number over all processes.
        """
        received, *others = largest_of_each([self.received or 0, *numbers])
        self.agreed = received > 0
        if self.agreed and self.received is None:
            self.received, self._first_at = received, time.monotonic()
        return others

    def abandon_if_received(self) -> None:
        """A collective call.

        Raises:
            Abandoned: in all processes, if any has a signal.
        """
        self.agree()
        if self.agreed:
            raise Abandoned

    def raise_if_received(self) -> None:
        """A collective call.

        Raises:
            Interrupted: in all processes, if any has a signal.
        """
        self.agree()
        if self.agreed and self.received is not None:
            raise self._interrupted(self.received, agreed=True)

    def _interrupted(self, number: int, *, agreed: bool) -> Interrupted:
        saved = self.saved_step is not None and self.saved_step == self._step and agreed
        said = None
        if self._step is not None and not saved:
            said = (
                "no state is saved: the same command starts again"
                if self.saved_step is None
                else f"the state after step {self.saved_step} is saved: the same command goes on from there"
            )
        return Interrupted(number, saved=saved, said=said, agreed=agreed)

    # --- what the trainer calls --------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = True
        self._step = state.global_step
        self.saved_step = state.global_step or None  # what a resume begins with is a checkpoint's

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step = state.global_step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved_step = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = False


@contextlib.contextmanager
def _watching(watch: Any) -> Iterator[None]:
    """Run `watch(numbers)` in a thread, with a socket that each signal's number arrives at, whatever the main thread
    does; it ends when the socket is closed."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, args=(reader,), name="watch-signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()


def _forget_watching() -> None:
    """A forked process has the socket of its parent, whose thread would take the child's signals for its own."""
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_watching)
