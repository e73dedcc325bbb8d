"""Work on many samples in several processes: results in the samples' order, and no process left behind.

    with closing(map_chunks(work, shared, chunks, processes=None)) as results:
        for result in results: ...

The processes are started anew (spawn): they share no thread, lock or CUDA context with this one, and each takes some
seconds to import what it needs. A script that comes here needs its `if __name__ == "__main__":`.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

from finetune.errors import Failed

MOST_PROCESSES = 8
WORTHWHILE_SECONDS = 20.0  # of work by one process; less is done before others have started
AHEAD = 4  # chunks begun for each process before the first of them is taken: bounds what waits in memory

Shared = TypeVar("Shared")
Result = TypeVar("Result")


class WorkerDied(Failed):
    """A worker process ended by itself: killed, for want of memory say, or crashed."""


def default_processes() -> int:
    """Processes to use: the CPUs of this machine that this process may use, shared with the others of its run."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), MOST_PROCESSES))


def map_chunks(
    work: Callable[[Shared, range], Result], shared: Shared, chunks: Sequence[range], processes: int | None
) -> Iterator[Result]:
    """`work(shared, chunk)` for each chunk, in order; in this process, or in several where that is faster.

    Args:
        work, shared: a function of a module, and what it needs besides the chunk; both pickle.
        chunks: ranges of samples, of about the same size.
        processes: how many; 1 is this one alone. None is `default_processes()`, if the time of the first chunk says
            that starting them pays.

    Raises:
        WorkerDied: a process ended before its work.
    """
    done = 0
    if processes is None:
        processes = default_processes()
        if chunks and processes > 1:
            started = time.monotonic()
            first = work(shared, chunks[0])
            if (time.monotonic() - started) * (len(chunks) - 1) < WORTHWHILE_SECONDS:
                processes = 1
            yield first
            done = 1
    if processes > 1 and len(chunks) - done > 1:
        with contextlib.closing(map_in_processes(work, shared, chunks[done:], processes)) as results:
            yield from results
    else:
        for chunk in chunks[done:]:
            yield work(shared, chunk)


def map_in_processes(
    work: Callable[[Shared, range], Result], shared: Shared, chunks: Sequence[range], processes: int
) -> Iterator[Result]:
    """As `map_chunks`, in so many processes. They are gone when the iterator is closed or raises.

    Raises:
        WorkerDied: a process ended before its work.
    """
    task = pickle.dumps((work, shared))
    workers: list[_Worker] = []
    try:
        with _sigint_held_back():
            for _ in range(min(processes, len(chunks))):
                workers.append(_Worker())
        for worker in workers:
            worker.send(task)
        idle, begun, taken = list(workers), 0, 0
        ready: dict[int, Result] = {}
        while taken < len(chunks):
            while idle and begun < min(len(chunks), taken + AHEAD * len(workers)):
                idle.pop().give(begun, chunks[begun])
                begun += 1
            busy = {worker.connection: worker for worker in workers if worker not in idle}
            for connection in wait(busy):
                number, result = busy[connection].take()
                ready[number] = result
                idle.append(busy[connection])
            while taken in ready:
                yield ready.pop(taken)
                taken += 1
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.end()


class _Crash(NamedTuple):
    """What a chunk raised in a worker."""

    error: Exception
    told: str


class _Worker:
    """A process, the pipe to it, and the chunk it is at."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # or its end would not show here
        self.chunk: range | None = None

    def send(self, task: bytes):
        with self._noticing_its_end():
            self.connection.send_bytes(task)

    def give(self, number: int, chunk: range):
        self.chunk = chunk
        with self._noticing_its_end():
            self.connection.send((number, chunk))

    def take(self) -> tuple[int, Any]:
        with self._noticing_its_end():
            number, result = self.connection.recv()
        if isinstance(result, _Crash):
            result.error.add_note(f"In a worker process:\n{result.told}")
            raise result.error
        return number, result

    @contextlib.contextmanager
    def _noticing_its_end(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError) as error:
            self.process.join(5)
            code = self.process.exitcode
            how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
            if code == -9:
                how += " (the kernel does that where memory runs out)"
            where = f"at samples {self.chunk.start + 1:,} to {self.chunk.stop:,}" if self.chunk else "as it started"
            raise WorkerDied(f"a worker process {how}, {where}. Nothing was decided: run it again") from error

    def end(self):
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()
        self.process.close()


def _serve(connection: Connection):
    """What a worker does: until the other end is gone, one chunk after the other."""
    with contextlib.suppress(EOFError, ConnectionError):
        work, shared = pickle.loads(connection.recv_bytes())
        while True:
            number, chunk = connection.recv()
            try:
                result = work(shared, chunk)
            except Exception as error:
                result = _Crash(error, traceback.format_exc())
            connection.send((number, result))


@contextlib.contextmanager
def _sigint_held_back() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal. Those started in here never see it: this one ends them."""
    if os.name == "nt":
        yield
        return
    resource_tracker.ensure_running()  # or it would be started with the first process, and let signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
