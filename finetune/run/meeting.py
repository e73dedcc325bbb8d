"""What the processes of a launcher tell each other without a process group: through its key-value store.

A collective fails when a process comes to it half an hour after the others, and checking data or replying to questions
may take as long as it takes. Here a process waits until it is told, or until another one says why it has failed.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from finetune.errors import Failed
from finetune.run.launch import launched_processes
from finetune.run.trouble import Trouble

T = TypeVar("T")

FAILED = "failed"
LONGEST_NAP = 0.5  # seconds between two looks
BEAT = 5.0  # seconds between two signs of life
DEAD_AFTER = 120.0  # seconds without one

_meetings = count()  # of this process


class Meeting:
    """The processes of a command. Values are JSON's; each name is told once.

    What waits for another process raises what that one has failed with; or that it has given no sign of life.

    Args:
        store: that all processes see.
        process, processes: the number of this one, and how many there are.
    """

    def __init__(self, store: dist.Store, process: int, processes: int):
        self.process, self.processes = process, processes
        self._store = store
        self._beats: dict[int, tuple[int, float]] = {}  # of others: their number, and when it was new here
        self._looked = time.monotonic()

    @property
    def is_main(self) -> bool:
        return self.process == 0

    def tell(self, name: str, value: Any) -> None:
        """Let the others `hear` it."""
        self._store.set(name, json.dumps(value))

    def hear(self, name: str) -> Any:
        """What another process tells, waiting for it.

        Raises:
            BaseException: see `raise_if_failed`.
        """
        self._wait_for(name)
        return json.loads(self._store.get(name))

    def _wait_for(self, name: str) -> None:
        nap = 0.01
        while not self._store.check([name]):
            self.raise_if_failed()
            time.sleep(nap)
            nap = min(2 * nap, LONGEST_NAP)

    def take(self, name: str) -> Any:
        """What another process has told, once; None where it has not yet."""
        if not self._store.check([name]):
            return None
        value = json.loads(self._store.get(name))
        self._store.delete_key(name)
        return value

    def from_main(self, name: str, make: Callable[[], Any]) -> Any:
        """What the main process makes, on all of them."""
        if not self.is_main:
            return self.hear(name)
        value = make()
        self.tell(name, value)
        return value

    def from_all(self, name: str, value: Any) -> list[Any]:
        """What each process has, in their order, on all of them."""
        self.tell(f"{name}/{self.process}", value)
        return [self.hear(f"{name}/{process}") for process in range(self.processes)]

    def put_bytes(self, name: str, content: bytes) -> None:
        self._store.set(name, content)  # type: ignore[arg-type]  # the store takes both

    def wait_for_bytes(self, name: str) -> bytes:
        """What another process has put there.

        Raises:
            BaseException: another process has failed.
        """
        self._wait_for(name)
        content: bytes = self._store.get(name)
        return content

    def drop(self, name: str) -> None:
        self._store.delete_key(name)

    def count(self, name: str) -> int:
        """Add one to a number that all processes have; the new number."""
        number: int = self._store.add(name, 1)
        return number

    def counted(self, name: str) -> int:
        """The number of calls of `count`."""
        number: int = self._store.add(name, 0)
        return number

    def raise_if_failed(self) -> None:
        """Raises:
        BaseException: another process has failed; see `Trouble.error`.
        """
        if self._store.check([FAILED]):
            trouble = Trouble(**json.loads(self._store.get(FAILED)))
            if trouble.process != self.process:
                raise trouble.error()
        now = time.monotonic()
        if now - self._looked < BEAT:
            return
        self._looked = now
        for process in range(self.processes):
            beats = self.counted(f"beats/{process}")  # 0 before it has come
            if (
                beats != self._beats.get(process, (0, now))[0]
                or process == self.process
                or self.counted(f"left/{process}")
            ):
                self._beats[process] = beats, now
            elif beats and now - self._beats[process][1] > DEAD_AFTER:
                raise Failed(f"process {process} has given no sign of life for {DEAD_AFTER:.0f} seconds")

    @contextmanager
    def giving_signs_of_life(self) -> Iterator[None]:
        """So that the others do not wait for ever for a process that was killed, on a machine that is gone."""
        ended = threading.Event()

        def beat() -> None:
            with suppress(Exception):  # the store ends with the launcher
                while not ended.wait(BEAT):
                    self.count(f"beats/{self.process}")

        self.count(f"beats/{self.process}")
        thread = threading.Thread(target=beat, name="signs-of-life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with suppress(Exception):
                self.count(f"left/{self.process}")

    @contextmanager
    def telling_failure(self) -> Iterator[None]:
        """Lets the others know of an error inside; the first one is what they hear of."""
        try:
            yield
        except BaseException as error:
            # The store may be gone, with the main process or the launcher: these end the others.
            with suppress(Exception):
                if not self._store.check([FAILED]):
                    self.tell(FAILED, Trouble.of(error, self.process).to_json())
            raise


@contextmanager
def meeting_of(command: str) -> Iterator[Meeting | None]:
    """The meeting of a command's processes; None where there is one process.

    A launched program may call the same command more than once, in the same order in all its processes.
    """
    if launched_processes() == 1:
        yield None
        return
    store, process, processes = next(iter(rendezvous("env://")))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    meeting = Meeting(dist.PrefixStore(f"finetune/{command}/{attempt}/{next(_meetings)}", store), process, processes)
    with meeting.giving_signs_of_life(), meeting.telling_failure():
        yield meeting
