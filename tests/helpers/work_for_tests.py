"""Work that worker processes are given in tests; imports nothing heavy, as they begin by importing this."""

import os
import signal
import time


def add(shared, chunk):
    return [shared + index for index in chunk]


def slow_first(shared, chunk):
    """Later chunks are done before earlier ones."""
    time.sleep(0.3 if chunk.start == 0 else 0)
    return chunk.start, os.getpid()


def die(shared, chunk):
    if chunk.start == shared:
        os.kill(os.getpid(), signal.SIGKILL)
    return chunk.start


def leave(shared, chunk):
    os._exit(3)


def refuse(shared, chunk):
    raise ValueError(f"no {chunk.start}")


def say_who_and_wait(shared, chunk):
    """Writes its process id where the test sees it, and takes its time."""
    note, seconds = shared
    with open(note, "a") as file:  # noqa: PTH123 (light on imports)
        file.write(f"{os.getpid()}\n")
    time.sleep(seconds)
