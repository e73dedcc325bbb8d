"""Tokens and images: per second, and all that was trained on, over all processes and parts of a run."""

import sys
import time
from dataclasses import asdict, astuple, dataclass

import torch

from finetune.batches.collate import NO_SAMPLE
from finetune.run.agreement import sum_of_each
from qwenvl.text.chat import IGNORED


@dataclass(frozen=True)
class Amounts:
    """What was trained on.

    Attributes:
        tokens: of all sequences.
        images: repetitions counted.
        supervised: tokens in the loss.
    """

    tokens: int = 0
    images: int = 0
    supervised: int = 0

    def __add__(self, other: "Amounts") -> "Amounts":
        return Amounts(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))

    def as_json(self) -> dict[str, int]:
        return asdict(self)


NOTHING = Amounts()


class Throughput:
    """Counts what this process trains on, and adds up what all have.

    Attributes:
        counted: by this process, since it began.
        before: by all processes, in earlier parts of the run.
        since: the moment of the last log.
    """

    def __init__(self) -> None:
        self.counted = self.before = NOTHING
        self.since = time.monotonic()
        self._logged = NOTHING  # of `counted`
        self._not_logged = 0  # supervised tokens of the steps that an earlier part did not log

    def begin(self, before: Amounts, not_logged: int) -> None:
        """Go on after earlier parts of a run.

        Args:
            before: what all processes had trained on.
            not_logged: supervised tokens of it that were not logged yet.
        """
        self.before, self._not_logged = before, not_logged
        self.since = time.monotonic()

    def count(self, batch: dict[str, torch.Tensor]) -> None:
        """Add one collated batch of this process."""
        # The one token of an empty place is no sample's.
        tokens = batch["input_ids"].numel() - int((batch["samples"] == NO_SAMPLE).sum())
        images = int(batch["sequence_images"].sum())
        self.counted += Amounts(tokens, images, int((batch["labels"] != IGNORED).sum()))

    def take_back(self, counted: Amounts) -> None:
        """Forget the batches since `counted` was read: their step was abandoned."""
        self.counted = counted

    def totals(self) -> Amounts:
        """What all processes have trained on since the run began; a collective call."""
        return self.before + Amounts(*sum_of_each(astuple(self.counted)))

    def supervised_since_log(self) -> int:
        """Supervised tokens of all processes since the last log; a collective call."""
        (supervised,) = sum_of_each([self.counted.supervised - self._logged.supervised])
        return self._not_logged + supervised

    def since_last(self, device: torch.device) -> dict[str, float]:
        """Return rates and supervised tokens of all processes since the last call, and the peak memory; a collective
        call."""
        seconds = max(time.monotonic() - self.since, 1e-9)
        logged, now = astuple(self._logged), astuple(self.counted)
        tokens, images, supervised = sum_of_each([new - old for new, old in zip(now, logged, strict=True)])
        figures: dict[str, float] = {
            "tokens_per_second": round(tokens / seconds, 1),
            "images_per_second": round(images / seconds, 2),
            "supervised_tokens": self._not_logged + supervised,
            "peak_memory_bytes": peak_memory(device),
        }
        self._logged, self._not_logged = self.counted, 0
        self.since = time.monotonic()
        return figures


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the accelerator where there is one, else of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
