"""How far a file operation of many gigabytes has come: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from finetune.quantities import format_bytes

QUIET_SECONDS = 3.0  # nothing is shown of what is done by then
LINE_SECONDS = 10.0


class ByteProgress:
    """Bytes done so far; call it with the number of bytes of each further piece."""

    def __init__(self, what: str, total: int, bar: tqdm | None):
        self.what = what
        self.total = total
        self.done = 0
        self._bar = bar
        self._started = self._last_line = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def rate(self) -> str:
        """19.3 GB in 25s, 0.8 GB/s"""
        return f"{format_bytes(self.done)} in {self.seconds:.1f}s, {format_bytes(self.done / self.seconds)}/s"

    def __call__(self, count: int) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            print(f"{self.what}: {self.done / self.total:.0%}, {self.rate()}", file=sys.stderr, flush=True)


@contextmanager
def byte_progress(what: str, total: int) -> Iterator[ByteProgress]:
    """Show on stderr how far `what` is, of `total` bytes."""
    if not sys.stderr.isatty():
        yield ByteProgress(what, total, None)
        return
    # Powers of 1000, as everywhere here.
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=QUIET_SECONDS, leave=False) as bar:
        yield ByteProgress(what, total, bar)
