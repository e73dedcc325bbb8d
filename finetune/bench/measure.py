"""What is measured while the trainer runs: the time of each optimizer step, and the most memory that steps hold."""

import gc
import time

import torch
from transformers import TrainerCallback

from finetune.bench.card_speed import synchronize
from finetune.memory.live_bytes import LiveBytes


class StepMeter(TrainerCallback):
    """Times the optimizer steps after the first ones, with all that is between them, and notes their peak memory.

    On CUDA the peak is the allocator's, over all steps. The CPU has no such counter: there every tensor of the last
    step before the timed ones is counted (`live_bytes`), which makes that step slow.

    Args:
        device: of the model.
        warm_up: steps before the timed ones, 2 at least; the first makes the optimizer's states and fills caches.
        steps: to time.

    Attributes:
        seconds: of each timed step.
        peak: most bytes in tensors on the device.
        reserved: most bytes that the allocator held; None on the CPU.
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
        """That the trainer takes, from 0."""
        return range(self.warm_up + self.steps)

    @property
    def counted_steps(self) -> range:
        """Those whose memory is measured, from 0."""
        return self.all_steps if self.device.type == "cuda" else range(self.warm_up - 1, self.warm_up)

    @property
    def timed_steps(self) -> range:
        """From 0."""
        return range(self.warm_up, self.warm_up + self.steps)

    def on_train_begin(self, args, state, control, **kwargs):
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what making the model has left would count as reserved
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_step_end(self, args, state, control, **kwargs):
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

    def close(self):
        """End counting. Twice does no harm."""
        counting, self._counting = self._counting, None
        if counting is not None:
            counting.__exit__(None, None, None)
            self.peak = self._there_before + max((moment.total for moment in counting.fullest.values()), default=0)


def bytes_of_tensors() -> int:
    """Of all tensors of this process in host memory, views counted once."""
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and found.device.type == "cpu" and found.layout == torch.strided:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
