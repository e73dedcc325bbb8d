"""Signals in DataLoader workers: only the process that started them ends them."""

import os
import signal
import threading
from collections.abc import Callable


def ignore_signals_from_others(worker: int, then: Callable[[int], None] | None = None) -> None:
    """Keep a DataLoader worker alive until its trainer ends it; a `worker_init_fn`.

    Ctrl-C, torchrun and a cluster's scheduler signal every process of a run. The trainer then finishes its step and
    saves, for which it needs more batches, and PyTorch raises in it as soon as a worker has exited. So the worker
    ignores SIGINT, and SIGTERM from any process but its parent. PyTorch's watchdog ends the workers of a trainer that
    was killed.

    Args:
        worker: its number.
        then: another `worker_init_fn` to call afterwards.
    """
    # Windows sends no such signals, and macOS does not say who sent one.
    if hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()
    if then is not None:
        then(worker)


def _exit_on_sigterm_from(parent: int) -> None:
    """Wait for a SIGTERM that the process `parent` sent, and exit."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
