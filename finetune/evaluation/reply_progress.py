"""Progress over a long list of questions: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
import time

from tqdm import tqdm

from finetune.quantities import format_duration
from finetune.terminal import terminal_line

QUIET_SECONDS = 3.0  # work that is done by then shows nothing
LINE_SECONDS = 10.0  # between two lines where there is no terminal


class ReplyProgress:
    """Shows progress on standard error while the context is open.

    Args:
        what: the name of the work.
        total: number of questions.
        bar: show a bar on a terminal; otherwise nothing is shown there.
        shows: False shows nothing anywhere.
    """

    def __init__(self, what: str, total: int, *, bar: bool = True, shows: bool = True):
        self._what, self._total, self._shows_bar = terminal_line(what), total, bar and shows
        self._shows = shows
        self._bar: tqdm | None = None

    def __enter__(self) -> "ReplyProgress":
        self._started = time.monotonic()
        self._shown = self._started + QUIET_SECONDS - LINE_SECONDS
        self._is_terminal = sys.stderr.isatty()
        if self._is_terminal and self._shows_bar:
            self._bar = tqdm(total=self._total, desc=self._what, unit=" examples", delay=QUIET_SECONDS, leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def reached(self, done: int) -> None:
        """Show that `done` questions are done, if it is time to."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            return
        if self._is_terminal or not self._shows:
            return
        now = time.monotonic()
        if now - self._shown < LINE_SECONDS:
            return
        self._shown = now
        rate = done / max(now - self._started, 1e-9)
        left = format_duration((self._total - done) / rate)
        line = f"{self._what}: {done:,} of {self._total:,} | {rate:.2f} examples/s | {left} left"
        print(line, file=sys.stderr, flush=True)
