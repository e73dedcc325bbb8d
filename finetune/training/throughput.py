"""How much is trained in how much time, and the memory that it takes."""

import time

import torch

from qwenvl.text.chat import IGNORED


class Throughput:
    """Tokens and images since the last log, for the figures of the live line."""

    def __init__(self):
        self.tokens = self.images = self.supervised = 0
        self.all_tokens = self.all_images = 0
        self.since = time.monotonic()

    def count(self, batch: dict[str, torch.Tensor]):
        """Add one collated batch of this process."""
        tokens, images = batch["input_ids"].numel(), int(batch["sequence_images"].sum())
        self.tokens += tokens
        self.images += images
        self.all_tokens += tokens
        self.all_images += images
        self.supervised += int((batch["labels"] != IGNORED).sum())

    def since_last(self, processes: int, device: torch.device) -> dict[str, float]:
        """Rates over all processes (taken to be alike) since the last call, and the peak memory so far."""
        seconds = max(time.monotonic() - self.since, 1e-9)
        figures = {
            "tokens_per_second": round(self.tokens * processes / seconds, 1),
            "images_per_second": round(self.images * processes / seconds, 2),
            "supervised_tokens": self.supervised * processes,
            "peak_memory_bytes": peak_memory(device),
        }
        self.tokens = self.images = self.supervised = 0
        self.since = time.monotonic()
        return figures


def peak_memory(device: torch.device) -> int:
    """Bytes: of the accelerator where there is one, else of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
