"""Progress of a pass over rows: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time

from tqdm import tqdm

from finetune.quantities import format_count, format_duration
from finetune.terminal import terminal_line

QUIET_SECONDS = 3.0  # a pass that is done by then shows nothing
LINE_SECONDS = 10.0  # between two lines where there is no terminal


class RowProgress:
    """Shows rows and rows a second on stderr.

    Args:
        what: what is done, such as "checking data".
        total: rows; None where that is not known.
        done: rows that were done before.
        unit: what is counted, if not rows.
        shown: False shows nothing.
    """

    def __init__(self, what: str, total: int | None, done: int = 0, unit: str = "rows", *, shown: bool = True):
        self.what, self.total, self.rows, self.unit, self.shown = terminal_line(what), total, done, unit, shown
        self._before, self._start = done, time.monotonic()
        self._said = self._start + QUIET_SECONDS - LINE_SECONDS
        self._bar: tqdm | None = None

    def __enter__(self) -> "RowProgress":
        if self.shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=self.total,
                initial=self.rows,
                desc=self.what,
                unit=f" {self.unit}",
                delay=QUIET_SECONDS,
                leave=False,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, rows: int) -> None:
        """Count rows that were done."""
        self.rows += rows
        if self._bar is not None:
            self._bar.update(rows)
            return
        now = time.monotonic()
        if self.shown and now - self._said >= LINE_SECONDS:
            print(f"{self.what}: {self._line(now)}", file=sys.stderr, flush=True)
            self._said = now

    def _line(self, now: float) -> str:
        rate = (self.rows - self._before) / max(now - self._start, 1e-9)
        of_all = "" if self.total is None else f" of {self.total:,}"
        text = f"{self.rows:,}{of_all} {self.unit}, {format_count(rate)} {self.unit}/s"
        if self.total is not None and rate > 0:
            text += f", {format_duration((self.total - self.rows) / rate)} left"
        return text
