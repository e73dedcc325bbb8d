"""A loader's worker processes end when their trainer says so, whoever else is told to stop."""

import os
import signal
import threading
from collections.abc import Callable


def ended_by_the_trainer_alone(worker: int, then: Callable[[int], None] | None = None):
    """A loader's `worker_init_fn`, for one that has to work on after the run was told to stop.

    Ctrl-C, torchrun and a cluster's scheduler signal every process of a run. The trainer wants to end its step and
    save, for which it needs more batches, and PyTorch raises in it as soon as a worker is gone. So a worker hears only
    the SIGTERM that its own trainer sends; a trainer that was killed is missed by PyTorch's watchdog.

    Args:
        worker: its number.
        then: what else is to be done as the worker starts, called with `worker`.
    """
    # Not on Windows, where no signal comes, and not on macOS, which does not tell who sent it.
    if hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_the_word_of, args=(os.getppid(),), daemon=True).start()
    if then is not None:
        then(worker)


def _end_at_the_word_of(trainer: int):
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
