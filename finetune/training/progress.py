"""The live line while a model trains.

On a terminal it is redrawn in place, with a permanent line above it for every evaluation and checkpoint:

    step 100/1000 | eval loss 0.9876, best so far | eval anls 0.4550 (boarding 0.0200, before 0.8900)
    step 100/1000 | checkpoint saved
    step 120/1000 | epoch 0.48/3 | loss 1.2345 | lr 1.00e-04 | 1.2k tok/s | 3.1 img/s | peak 5.3 GB | 2h 04m left

Elsewhere (a file, a pipe, a job's log) the same lines are printed, one for each log event, without control characters.
Only the main process prints.
"""

import atexit
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from finetune.quantities import (
    format_bytes,
    format_count,
    format_duration,
    format_learning_rate,
    format_loss,
    is_number,
)
from finetune.report.logged_scores import is_score, parts_of_scores
from finetune.run.checkpoints import checkpoint_path
from finetune.terminal import terminal_text

SEPARATOR = " | "
REDRAW_SECONDS = 0.1  # the least time between two redraws without new values; faster cannot be read

# How a logged number is formatted, in the order of the line.
_LOGGED = {
    "loss": lambda value: f"loss {format_loss(value)}",
    "learning_rate": lambda value: f"lr {format_learning_rate(value)}",
    "tokens_per_second": lambda value: f"{format_count(value)} tok/s",
    "images_per_second": lambda value: f"{format_count(value)} img/s",
    "peak_memory_bytes": lambda value: f"peak {format_bytes(value)}",
}
# The fields that a narrow terminal leaves out, in this order. The step always stays.
_OPTIONAL = (
    *("images_per_second", "peak_memory_bytes", "epoch", "tokens_per_second"),
    *("learning_rate", "left", "loss", "evaluating"),
)


class Progress(TrainerCallback):
    """The live line, or plain lines where there is no terminal.

    It reads these keys of `logs`, and leaves out those that are missing: loss, learning_rate, tokens_per_second,
    images_per_second, peak_memory_bytes (bytes), epoch, eval_loss and other eval_* scores; and, after a pack did not
    fit into the memory, out_of_memory_tokens with (evaluation_)tokens_per_batch.

    Call `close()` when training ends with an exception, to restore the terminal. At the end of training and at the
    interpreter's exit it is called automatically.

    Args:
        stream: where to write; standard output by default.
        checkpoints: the folder of the checkpoints; None leaves it out of a checkpoint's line.
        log: called with each line that is printed, or would be where there is no terminal.
        clock: returns seconds, from any start; for the time left.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        checkpoints: str | os.PathLike | None = None,
        log: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = sys.stdout if stream is None else stream
        self._checkpoints = None if checkpoints is None else Path(checkpoints)
        self._log = log or (lambda line: None)
        self._clock = clock
        self._pace = _Pace(clock)
        self._latest: dict[str, float] = {}
        self._best: tuple[float, int] | None = None  # eval loss, step
        self._evaluated_batches = 0
        self._drawn_at = -math.inf
        self._live: Live | None = None

    # --- what the trainer calls --------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._pace = _Pace(self._clock)
        self._latest, self._evaluated_batches = {}, 0
        # The log of a resumed run holds its first part, and with it the best evaluation so far.
        for record in state.log_history:
            self._note_best(record, int(record.get("step", 0)))
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._open()
        if state.global_step:
            self._say(f"resumed at {_step(state)}")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._pace.step()
            self._redraw(args, state)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            self._evaluated_batches += 1
            self._redraw(args, state, batches=_length(eval_dataloader))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._evaluated_batches = 0
            self._pace.pause_ended()
            self._redraw(args, state, always=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._pace.pause_ended()
            where = "" if self._checkpoints is None else f": {checkpoint_path(self._checkpoints, state.global_step)}"
            self._say(f"{_step(state)}{SEPARATOR}checkpoint saved{where}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        numbers = {key: value for key, value in (logs or {}).items() if is_number(value)}
        if any(is_score(key) for key in numbers):
            self._say(SEPARATOR.join([_step(state), *self._scores(numbers, state.global_step)]))
            self._note_best(numbers, state.global_step)
        if "out_of_memory_tokens" in numbers:
            self._say(f"{_step(state)}{SEPARATOR}{_lowered_budget(numbers)}")
        if "loss_scale" in numbers:
            self._say(f"{_step(state)}{SEPARATOR}{_skipped(numbers)}")
        if any(key in numbers for key in _LOGGED):
            self._latest = {key: numbers[key] for key in _LOGGED if key in numbers}
            line = SEPARATOR.join(self._fields(args, state).values())
            if self._live is None:
                self._say(line)
            else:
                self._log(line)
                self._redraw(args, state, always=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._redraw(args, state, always=True)
        self.close()
        # Early stopping, a signal and a callback's request all end here.
        if state.global_step < state.max_steps:
            self._say(f"stopped at step {state.global_step} of {state.max_steps}")

    # --- the terminal ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Keep the live line, put the cursor below it and restore the standard streams. May be called twice."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
            atexit.unregister(self.close)

    def _open(self) -> None:
        self.close()
        # What other code prints goes above the line; what it writes into a redirected stream stays there.
        on_screen = self._stream is sys.stdout
        console = Console(file=self._stream, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._live = Live(
            Text("waiting for the first step"),
            console=console,
            auto_refresh=False,
            redirect_stdout=on_screen,
            redirect_stderr=on_screen and sys.stderr.isatty(),
        )
        self._live.start(refresh=True)
        # A killed run could not show a hidden cursor again.
        console.show_cursor(True)
        atexit.register(self.close)

    def _say(self, line: str) -> None:
        """Print a permanent line."""
        self._log(line)
        line = terminal_text(line)
        if self._live is None:
            print(line, file=self._stream, flush=True)
        else:
            self._live.console.print(Text(line), soft_wrap=True)

    def _redraw(
        self, args: TrainingArguments, state: TrainerState, *, batches: int | None = None, always: bool = False
    ) -> None:
        now = self._clock()
        if self._live is None or (now - self._drawn_at < REDRAW_SECONDS and not always):
            return
        self._drawn_at = now
        fields = self._fields(args, state)
        if self._evaluated_batches:
            of = f"/{batches}" if batches else ""
            fields = {"step": fields["step"], "evaluating": f"evaluating, batch {self._evaluated_batches}{of}"}
        fields = _fit(fields, self._live.console.width)
        line = Text(no_wrap=True, overflow="ellipsis")
        for number, field in enumerate(fields.values()):
            line.append(SEPARATOR if number else "", style="dim")
            line.append(field)
        self._live.update(line, refresh=True)

    # --- the text of the lines ---------------------------------------------------------------------------------------

    def _fields(self, args: TrainingArguments, state: TrainerState) -> dict[str, str]:
        """The fields of the training line."""
        fields = {"step": _step(state)}
        if state.epoch is not None and math.isfinite(state.epoch):
            # With max_steps, the number of epochs follows from the steps and is not known in advance.
            of = "" if args.max_steps > 0 else f"/{args.num_train_epochs:g}"
            fields["epoch"] = f"epoch {state.epoch:.2f}{of}"
        fields |= {key: _LOGGED[key](value) for key, value in self._latest.items()}
        left = self._pace.seconds_left(state.max_steps - state.global_step)
        if left is not None:
            fields["left"] = f"{format_duration(left)} left"
        return fields

    def _scores(self, numbers: Mapping[str, float], step: int) -> list[str]:
        """The scores of an evaluation, the loss first and compared with the best one."""
        scores = []
        loss = numbers.get("eval_loss")
        if loss is not None:
            if self._best is None or loss < self._best[0]:
                remark = ", best so far" if math.isfinite(loss) else ""
            else:
                remark = f", best {format_loss(self._best[0])} at step {self._best[1]}"
            scores.append(f"eval loss {format_loss(loss)}{remark}{_on_long(numbers)}")
        for key, parts in parts_of_scores(numbers).items():
            if key != "eval_loss":
                text = f"{key.replace('_', ' ')} {format_loss(numbers[key])}"
                each = ", ".join(f"{name} {format_loss(numbers[part])}" for part, name in parts.items())
                scores.append(f"{text} ({each})" if each else text)
        return scores

    def _note_best(self, record: Mapping[str, Any], step: int) -> None:
        loss = record.get("eval_loss")
        if is_number(loss) and math.isfinite(loss) and (self._best is None or loss < self._best[0]):
            self._best = (float(loss), step)


class _Pace:
    """Estimates the time left from the last steps of this process.

    The first step does not count: it waits for the first batch, compiles and fills caches. The time of evaluations and
    checkpoints is counted apart and spread over all steps, so that one does not make the steps after it look slow. The
    estimate is a mean and not a median: a GPU runs asynchronously, and one step may wait for the work of several.
    """

    STEPS = 50

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=self.STEPS + 1)  # of steps, seconds without pauses
        self._steps = 0
        self._paused = 0.0  # seconds
        self._mark = 0.0  # where the last step or pause ended

    def step(self) -> None:
        self._mark = self._clock()
        self._ends.append(self._mark - self._paused)
        self._steps += 1

    def pause_ended(self) -> None:
        now = self._clock()
        if self._steps:  # not an evaluation before training, which does not come again
            self._paused += now - self._mark
        self._mark = now

    def seconds_left(self, steps: int) -> float | None:
        """Seconds that a number of steps will take; None before the second step."""
        if len(self._ends) < 2 or steps < 0:
            return None
        each = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return steps * (each + self._paused / self._steps)


def _on_long(numbers: Mapping[str, float]) -> str:
    """Say that an evaluation's loss is not the training objective on samples beyond the model's `seq_length`."""
    count = numbers.get("eval_long_samples", 0)
    of = f" of {numbers['eval_samples']:,}" if "eval_samples" in numbers else ""
    return (
        f" ({count:,}{of} samples beyond seq_length, with positions that training does not stretch)" if count else ""
    )


def _lowered_budget(numbers: Mapping[str, float]) -> str:
    """Say that a pack did not fit into the memory (see `out_of_memory.PackBudget`), and the new budget."""
    too_many = f"out of memory with {numbers['out_of_memory_tokens']:,} tokens in one forward"
    if "tokens_per_batch" in numbers:
        return f"{too_many}: at most {numbers['tokens_per_batch']:,} from now on, with the same loss and gradients"
    return f"{too_many} of evaluation: at most {numbers['evaluation_tokens_per_batch']:,} from now on"


def _skipped(numbers: Mapping[str, float]) -> str:
    """Say that a step changed nothing (see `loss_scale`)."""
    return f"skipped: its gradients overflow float16; the loss is scaled by {numbers['loss_scale']:g} from now on"


def _step(state: TrainerState) -> str:
    return f"step {state.global_step}/{state.max_steps}" if state.max_steps > 0 else f"step {state.global_step}"


def _fit(fields: dict[str, str], width: int) -> dict[str, str]:
    """The fields that fit into a line of `width` columns."""
    fields = dict(fields)
    for key in _OPTIONAL:
        if len(SEPARATOR.join(fields.values())) <= width:
            break
        fields.pop(key, None)
    return fields


def _length(dataloader: Any) -> int | None:
    """The number of batches; None where it is not known."""
    try:
        return len(dataloader)
    except TypeError:
        return None


def drop_own_printers(trainer: Trainer) -> None:
    """Remove Transformers' printers, which would print beside `Progress`."""
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
