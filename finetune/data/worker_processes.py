"""Work on many samples in several processes: results in the samples' order, and no process survives.

    with closing(map_chunks(work, shared, chunks, processes=None)) as results:
        for result in results: ...

The processes are spawned: they share no thread, lock or CUDA context with this one, and each takes some seconds to
import what it needs. A script that calls this needs its `if __name__ == "__main__":`.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

from finetune.errors import Failed

MOST_PROCESSES = 8
WORTHWHILE_SECONDS = 20.0  # of work by one process; less is done before other processes have started
AHEAD = 4  # chunks per process whose results may wait in memory to be taken

Shared = TypeVar("Shared")
Result = TypeVar("Result")


class WorkerDied(Failed):
    """A worker process was killed, for example because memory ran out, or crashed."""


def default_processes() -> int:
    """Processes to use: the CPUs that this process may use, divided by the processes of its run on this machine."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), MOST_PROCESSES))


def map_chunks(
    work: Callable[[Shared, range], Result], shared: Shared, chunks: Sequence[range], processes: int | None
) -> Generator[Result]:
    """Yield `work(shared, chunk)` for each chunk, in order; in this process, or in several where that is faster.

    Args:
        work, shared: a function of a module, and what it needs besides the chunk; both pickle.
        chunks: ranges of samples, of about the same size.
        processes: how many; 1 is this one alone. None is `default_processes()` where the time of the first chunk shows
            that starting them is worthwhile.

    Raises:
        WorkerDied: a process ended before its work was done.
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
) -> Generator[Result]:
    """As `map_chunks`, in this many processes. They are ended when the generator is closed or raises.

    Raises:
        WorkerDied: a process ended before its work was done.
    """
    task = pickle.dumps((work, shared))
    workers: list[_Worker] = []
    try:
        with _blocking_sigint():
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
            busy = [worker for worker in workers if worker not in idle]
            answered = wait([worker.connection for worker in busy])
            for worker in busy:
                if worker.connection in answered:
                    number, result = worker.take()
                    ready[number] = result
                    idle.append(worker)
            while taken in ready:
                yield ready.pop(taken)
                taken += 1
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.end()


class _Crash(NamedTuple):
    """An exception in a worker, and its traceback as text."""

    error: Exception
    text: str


class _Worker:
    """A process, the pipe to it, and the chunk it works on."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # else reading from our end would not fail when the process has ended
        self.chunk: range | None = None

    def send(self, task: bytes) -> None:
        with self._raising_its_end():
            self.connection.send_bytes(task)

    def give(self, number: int, chunk: range) -> None:
        self.chunk = chunk
        with self._raising_its_end():
            self.connection.send((number, chunk))

    def take(self) -> tuple[int, Any]:
        with self._raising_its_end():
            number, result = self.connection.recv()
        if isinstance(result, _Crash):
            result.error.add_note(f"In a worker process:\n{result.text}")
            raise result.error
        return number, result

    @contextlib.contextmanager
    def _raising_its_end(self) -> Iterator[None]:
        """Raise WorkerDied where the pipe is broken."""
        try:
            yield
        except (EOFError, ConnectionError) as error:
            self.process.join(5)
            code = self.process.exitcode
            how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
            if code == -9:
                how += " (the kernel does that where memory runs out)"
            where = f"at samples {self.chunk.start + 1:,} to {self.chunk.stop:,}" if self.chunk else "as it started"
            raise WorkerDied(f"a worker process {how}, {where}. Run it again") from error

    def end(self) -> None:
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()
        self.process.close()


def _serve(connection: Connection) -> None:
    """Work on one chunk after the other until the other end of the pipe is closed; runs in a worker process."""
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
def _blocking_sigint() -> Iterator[None]:
    """Start processes that ignore Ctrl-C, which a terminal sends to all of its processes: this one ends them."""
    if os.name == "nt":
        yield
        return
    resource_tracker.ensure_running()  # else the first process would start it, which unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
