"""`python -m finetune` in a process of its own that is forked from one where what it imports is there already.

Most of a short run's time is imports, and the tests make dozens of runs. The process that is forked from has run
nothing, so a run finds what it would find at its own start: it is killed, signalled and resumed as any other. Tests of
launchers, and those that look at what is imported, start Python themselves.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import huggingface_hub.constants

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["finetune.training.train"])


class Started:
    """A command that goes on while the test does; methods are those of `subprocess.Popen`.

    Args:
        arguments: of the command.
        program: a script to run in place of `finetune`.
        cwd: its working directory; None for this one's.
        env: its environment; None for this one's.
        start_new_session: give it a process group of its own, as a terminal does.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        program: Path | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
    ):
        self.args = [str(program or "finetune"), *map(str, arguments)]
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        self._said: tuple[str, str] | None = None  # once it has ended
        place = str(cwd or Path.cwd()), dict(os.environ if env is None else env), start_new_session
        self._process = FORKING.Process(target=_run, args=(self.args, program is not None, *place, self._files))
        self._process.start()
        self.pid = self._process.pid
        atexit.register(self.kill)  # Python's end waits for a process, and a test that fails may leave one

    def said_so_far(self) -> tuple[str, str]:
        """What it has written on standard output and on standard error."""
        if self._said is not None:
            return self._said
        stdout, stderr = (file.read_text() for file in self._files)
        return stdout, stderr

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        if self.poll() is None:
            self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code; negative for the number of the signal that ended it.

        Raises:
            TimeoutExpired: it still runs after so many seconds.
        """
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        if self._said is None:
            self._said = self.said_so_far()
            self._folder.cleanup()
            atexit.unregister(self.kill)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it wrote on standard output and on standard error."""
        self.wait(timeout)
        return self.said_so_far()


def run_forked(
    arguments: Sequence[str | Path],
    timeout: float,
    program: Path | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """As `subprocess.run` of the command would.

    Raises:
        TimeoutExpired: it was killed after `timeout` seconds.
    """
    started = Started(arguments, program, cwd, env)
    try:
        code = started.wait(timeout)
    except subprocess.TimeoutExpired:
        started.kill()
        started.wait()
        raise
    return subprocess.CompletedProcess(started.args, code, *started.communicate())


def _run(
    words: list[str], is_script: bool, cwd: str, environment: dict[str, str], new_session: bool, said: list[Path]
) -> None:
    gc.freeze()  # each search for garbage would go through all that was imported
    if new_session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if "HF_HOME" in environment:
        huggingface_hub.constants.HF_HOME = environment["HF_HOME"]  # read from the environment when it is imported
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the process that is forked from ignores
    multiprocessing.set_start_method(None, force=True)  # as by itself: it would start a loader's workers as it was
    for descriptor, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = words
    if is_script:
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module("finetune", run_name="__main__", alter_sys=True)
