"""`python -m finetune` in a process of its own that is forked from one where what it imports is there already.

Most of a short run's time is imports, and the tests make dozens of runs. The process that is forked from has run
nothing, so a run finds what it would find at its own start. Tests that kill a run, launch several processes or look at
what is imported start Python themselves.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["finetune.training.train"])


def run_forked(
    arguments: Sequence[str], timeout: float, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """As `subprocess.run` of the command would.

    Raises:
        TimeoutExpired: it was killed after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        process, said = start_forked(arguments, Path(folder), cwd, env)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["finetune", *arguments], timeout)
        stdout, stderr = (file.read_text() for file in said)
    return subprocess.CompletedProcess(["finetune", *arguments], process.exitcode, stdout, stderr)


def start_forked(
    arguments: Sequence[str], folder: Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> tuple[multiprocessing.process.BaseProcess, list[Path]]:
    """Start the command; its process, and the files in `folder` that have its stdout and stderr."""
    said = [folder / name for name in ("stdout", "stderr")]
    process = FORKING.Process(
        target=_finetune, args=(list(arguments), str(cwd or Path.cwd()), dict(env or os.environ), said)
    )
    process.start()
    return process, said


def _finetune(arguments: list[str], cwd: str, environment: dict[str, str], said: list[Path]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the process that is forked from ignores
    for descriptor, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["finetune", *arguments]
    runpy.run_module("finetune", run_name="__main__", alter_sys=True)
