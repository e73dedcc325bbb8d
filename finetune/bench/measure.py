"""Measure the time of each optimizer step and the peak memory of the steps while the trainer runs."""

import gc
import time
from typing import Any

import torch
from torch._subclasses import FakeTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.bench.card_speed import synchronize
from finetune.memory.live_bytes import LiveBytes


class StepMeter(TrainerCallback):
    """Times optimizer steps after a warm-up, each from the end of the one before, and records peak memory.

    On CUDA the peak is the allocator's, over all steps. The CPU has no such counter: there the tensors of the last
    warm-up step are counted (`live_bytes`), which makes that step slow.

    Args:
        device: of the model.
        warm_up: steps before the timed ones, at least 2; the first one allocates optimizer states and fills caches.
        steps: to be timed.

    Attributes:
        seconds: of each timed step.
        peak: most bytes in tensors on the device.
        reserved: most bytes that the allocator reserved; None on the CPU.
    """

    def __init__(self, device: torch.device, *, warm_up: int, steps: int):
        assert warm_up >= 2
        self.device = device
        self.warm_up, self.steps = warm_up, steps
        self.seconds: list[float] = []
        self.peak: int | None = None
        self.reserved: int | None = None
        self._counting: LiveBytes | None = None
        self._there_before = 0
        self._last = 0.0

    @property
    def all_steps(self) -> range:
        """All steps of the training, counted from 0."""
        return range(self.warm_up + self.steps)

    @property
    def counted_steps(self) -> range:
        """The steps whose memory is measured, counted from 0."""
        return self.all_steps if self.device.type == "cuda" else range(self.warm_up - 1, self.warm_up)

    @property
    def timed_steps(self) -> range:
        """The steps that are timed, counted from 0."""
        return range(self.warm_up, self.warm_up + self.steps)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # memory cached while the model was made would count as reserved
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        synchronize(self.device)
        if state.global_step > self.warm_up:
            self.seconds.append(time.perf_counter() - self._last)
        elif self.device.type == "cpu" and state.global_step == self.warm_up - 1:
            gc.collect()
            self._there_before = bytes_of_tensors()
            self._counting = LiveBytes()
            self._counting.__enter__()
        else:
            self.close()
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
            self.reserved = torch.cuda.max_memory_reserved(self.device)
        self._last = time.perf_counter()

    def close(self) -> None:
        """End counting; a second call does nothing."""
        counting, self._counting = self._counting, None
        if counting is not None:
            counting.__exit__(None, None, None)
            self.peak = self._there_before + max((moment.total for moment in counting.fullest.values()), default=0)


def bytes_of_tensors() -> int:
    """Bytes of all tensors of this process in host memory, each storage once."""
    storages = {}
    for found in gc.get_objects():
        # FakeTensors, left by torch.compile (bitsandbytes uses it), have no memory.
        if not issubclass(type(found), torch.Tensor) or issubclass(type(found), FakeTensor):
            continue
        if found.device.type == "cpu" and found.layout == torch.strided:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
