"""Lines about the progress of a warm start, with averages since the previous line."""

import time
from collections import defaultdict

SECONDS = 20.0


class Lines:
    """Prints a line every `SECONDS`: step, averages, speed and the minutes left.

    Args:
        name: at the beginning of each line.
        steps: in all.
        step: from which this process goes on.
    """

    def __init__(self, name: str, steps: int, step: int) -> None:
        self.name, self.steps, self.first = name, steps, step
        self.started = self.told = time.monotonic()
        self.sums: dict[str, float] = defaultdict(float)
        self.counts = 0

    def add(self, step: int, **figures: float) -> None:
        """Count the figures of a step that was taken."""
        for name, value in figures.items():
            self.sums[name] += value
        self.counts += 1
        now = time.monotonic()
        if now - self.told < SECONDS and step < self.steps:
            return
        speed = (step - self.first) / (now - self.started)
        shown = "  ".join(f"{name} {value / self.counts:.4f}" for name, value in self.sums.items())
        left = (self.steps - step) / speed / 60
        print(f"{self.name}  step {step}/{self.steps}  {shown}  {speed:.1f} steps/s  {left:.0f} min left", flush=True)
        self.told, self.counts = now, 0
        self.sums.clear()
