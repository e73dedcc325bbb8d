"""The seconds of a run by phase; the phases follow one another without a gap."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Phases(TrainerCallback):
    """A phase lasts until the next one begins. The trainer's events mark those inside training.

    | phase | what |
    |---|---|
    | read | finding the checkpoint, reading and checking the data |
    | load | reading the weights, quantising them, putting the adapter on, making the trainer, a resumed run's state |
    | encode | the features of all images, where there is a vision cache |
    | evaluate | losses and replies: before, in and after training |
    | batches | between the steps: waiting for batches, logging |
    | forward_backward | forwards and backwards of the optimizer steps, and clipping; DeepSpeed's optimizer too |
    | optimizer | the optimizer's own work |
    | checkpoint | writing the state to resume from |
    | save | writing the result |

    Seconds are those of the main process, over all parts of a run. A GPU runs asynchronously, so what one phase
    launches can end in the next. Over many steps the sums are right, because each step waits for the device when it
    checks the loss.

    In the trainer's list it comes after the callbacks that decide about evaluating and saving.

    Args:
        first: the phase that begins at once.
        clock: returns seconds, from any start.
    """

    def __init__(self, first: str, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._epoch = time.time() - clock()  # seconds since 1970 where the clock is 0
        self._phases: dict[str, dict[str, Any]] = {}
        self._current: str | None = None
        self._since = 0.0
        self.begin(first)

    def begin(self, name: str) -> None:
        """End the current phase and begin this one; a phase that has begun already goes on."""
        if name == self._current:
            return
        self._count()
        self._current = name
        self._phases.setdefault(name, {"seconds": 0.0, "times": 0, "began": self._since})["times"] += 1

    def go_on_after(self, recorded: Any) -> None:
        """Add what an earlier part of the run recorded; nothing where it is not as `record` gives it."""
        for name, phase in recorded.items() if isinstance(recorded, Mapping) else ():
            with suppress(TypeError, KeyError, ValueError):
                seconds, times = float(phase["seconds"]), int(phase["times"])
                began, ended = (
                    datetime.fromisoformat(phase[key]).timestamp() - self._epoch for key in ("began", "ended")
                )
                own = self._phases.get(name, {"seconds": 0.0, "times": 0, "ended": ended})
                self._phases[name] = {
                    "seconds": own["seconds"] + seconds,
                    "times": own["times"] + times,
                    "began": began,
                    "ended": own.get("ended", ended),
                }

    @property
    def seconds(self) -> float:
        """Of all phases together."""
        self._count()
        return sum(phase["seconds"] for phase in self._phases.values())

    def record(self) -> dict[str, dict[str, Any]]:
        """Return what `run.json` has: for each phase its `seconds` in all, how many `times` it took place, when it
        first `began` and last `ended` (ISO 8601, to the millisecond).
        """
        self._count()
        return {
            name: {
                "seconds": round(phase["seconds"], 3),
                "times": phase["times"],
                "began": self._moment(phase["began"]),
                "ended": self._moment(phase["ended"]),
            }
            for name, phase in self._phases.items()
        }

    def _count(self) -> None:
        """Add the time since the last call to the current phase."""
        now = self._clock()
        if self._current is not None:
            phase = self._phases[self._current]
            phase["seconds"] += now - self._since
            phase["ended"] = now
        self._since = now

    def _moment(self, seconds: float) -> str:
        return datetime.fromtimestamp(self._epoch + seconds, UTC).isoformat(timespec="milliseconds")

    # --- what the trainer calls --------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin("batches")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin("forward_backward")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin("optimizer")

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin("evaluate")  # also one that a resumed run has to make up for

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin("evaluate" if control.should_evaluate else _without_evaluation(control))

    on_epoch_end = on_step_end

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin(_without_evaluation(control))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.begin("batches")


def _without_evaluation(control: TrainerControl) -> str:
    return "checkpoint" if control.should_save else "batches"
