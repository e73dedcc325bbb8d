"""Tokens and images per second, and the peak memory."""

import sys
import time

import torch

from finetune.batches.collate import NO_SAMPLE
from qwenvl.text.chat import IGNORED


class Throughput:
    """Counts tokens and images since the last log."""

    def __init__(self) -> None:
        self.tokens = self.images = self.supervised = 0
        self.all_tokens = self.all_images = 0
        self.since = time.monotonic()

    def count(self, batch: dict[str, torch.Tensor]) -> None:
        """Add one collated batch of this process."""
        # The one token of an empty place is no sample's.
        tokens = batch["input_ids"].numel() - int((batch["samples"] == NO_SAMPLE).sum())
        images = int(batch["sequence_images"].sum())
        self.tokens += tokens
        self.images += images
        self.all_tokens += tokens
        self.all_images += images
        self.supervised += int((batch["labels"] != IGNORED).sum())

    def since_last(self, processes: int, device: torch.device) -> dict[str, float]:
        """Return rates since the last call and the peak memory. All processes are taken to be equally fast."""
        seconds = max(time.monotonic() - self.since, 1e-9)
        figures: dict[str, float] = {
            "tokens_per_second": round(self.tokens * processes / seconds, 1),
            "images_per_second": round(self.images * processes / seconds, 2),
            "supervised_tokens": self.supervised * processes,
            "peak_memory_bytes": peak_memory(device),
        }
        self.tokens = self.images = self.supervised = 0
        self.since = time.monotonic()
        return figures


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the accelerator where there is one, else of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
