"""`log.txt` of a run: what was printed, warned of and complained about, with times."""

import contextlib
import logging
import traceback
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from finetune.errors import Failed, InputError, Interrupted
from finetune.files.path_errors import write_errors
from finetune.terminal import Say, labelled, terminal_text


class RunLog:
    """Adds lines to the log of a run, each with the time, as soon as they are said.

    Until `open` is called lines are kept in memory: what a command says before it is known to continue the run in the
    folder, or to begin one, is no part of that run's log.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._file: TextIO | None = None

    def open(self, file: Path) -> None:
        """Begin to write, at the end of the file.

        Raises:
            PathError, DiskError: it cannot be written.
        """
        with write_errors(file):
            self._file = file.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
            self._file.writelines(self._lines)
        self._lines.clear()

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk: all that could be written is there
                self._file.close()
        self._file = None

    def write(self, text: str) -> None:
        """Add a text. A disk that is full ends no run: its own files will say so."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        lines = [f"{now} {line}\n" for line in terminal_text(text).split("\n")]
        if self._file is None:
            self._lines += lines
            return
        with contextlib.suppress(OSError):
            for line in lines:
                self._file.write(line)

    def heard(self, say: Say) -> Say:
        """`say`, whose lines are added to the log as well."""

        def say_and_log(label: str, text: object = "", /) -> None:
            say(label, text)
            self.write(labelled(label, text))

        return say_and_log


@contextlib.contextmanager
def run_log() -> Iterator[RunLog]:
    """A log that has warnings too, and the sentence or the traceback of the error that ends the run."""
    log = RunLog()
    with contextlib.ExitStack() as stack:
        stack.callback(log.close)
        _hear_warnings(log, stack)
        try:
            yield log
        except BaseException as error:
            log.write(_sentence(error))
            raise


def _sentence(error: BaseException) -> str:
    if isinstance(error, Interrupted):
        saved = error.said or ("the state is saved" if error.saved else "nothing was trained")
        return f"interrupted by {error}; {saved}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by SIGINT"
    if isinstance(error, InputError | Failed):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


class _LogHandler(logging.Handler):
    def __init__(self, log: RunLog):
        super().__init__(logging.WARNING)
        self.log = log
        self._last: logging.LogRecord | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record is self._last:  # it was heard at Transformers' logger and has come to the root's
            return
        self._last = record
        self.log.write(f"{record.levelname.lower():<11} {record.name}: {record.getMessage()}")


def _hear_warnings(log: RunLog, stack: contextlib.ExitStack) -> None:
    handler = _LogHandler(log)
    # Transformers' logger hands nothing on to the root's handlers, unless the environment has CI=1.
    for logger in (logging.getLogger(), logging.getLogger("transformers")):
        logger.addHandler(handler)
        stack.callback(logger.removeHandler, handler)
    show = warnings.showwarning

    def show_and_log(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        show(message, category, *place, **more)
        log.write(f"{'warning':<11} {category.__name__}: {message}")

    warnings.showwarning = show_and_log
    stack.callback(setattr, warnings, "showwarning", show)
