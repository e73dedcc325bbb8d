"""The conversations of all open pages."""

import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from finetune.demo.asked_model import AskedModel
from finetune.demo.talk import Talk

KEPT_SECONDS = 3600
"""How long a conversation is kept after its visitor has left."""
MOST_VISITORS = 100


class Visitors:
    """The conversation of each open page.

    Args:
        models: that are asked.
        folder: of the page's files; each visitor has a folder of its own in it.
    """

    def __init__(self, models: Sequence[AskedModel], folder: Path) -> None:
        self._models, self._folder = models, folder
        self._talks: dict[str, Talk] = {}
        self._left: dict[str, float] = {}
        self._lock = threading.Lock()

    def talk(self, session: str) -> Talk:
        """The conversation of a page, by its session; a new one where there is none, or where it was left long ago."""
        with self._lock:
            self._left.pop(session, None)
            self._drop_old()
            if session not in self._talks:
                folder = self._folder / f"visitor-{len(self._talks)}-{time.monotonic_ns()}"
                folder.mkdir(mode=0o700)
                self._talks[session] = Talk(self._models, folder)
            return self._talks[session]

    def leave(self, session: str) -> None:
        """The visitor has closed the page, or lost the connection: end the reply that is being written."""
        with self._lock:
            if session in self._talks:
                self._talks[session].stop()
                self._left[session] = time.monotonic()

    def _drop_old(self) -> None:
        """Forget the conversations of those who left long ago, and the oldest ones where there are too many."""
        now = time.monotonic()
        old = [session for session, since in self._left.items() if now - since > KEPT_SECONDS]
        excess = max(0, len(self._talks) - len(old) - MOST_VISITORS + 1)
        for session in [*old, *[session for session in self._talks if session not in old][:excess]]:
            talk = self._talks.pop(session)
            self._left.pop(session, None)
            talk.forget()
            shutil.rmtree(talk.folder, ignore_errors=True)
