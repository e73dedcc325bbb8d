"""The command line: `finetune RECIPE [key.path=value ...]`, and `finetune COMMAND ...` for everything else.

Exit codes: 0 done, 1 failed, 2 the user's input is wrong, 130 / 143 interrupted with the state saved.
"""

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import FrameType
from typing import NoReturn, TextIO

from finetune.errors import Failed, InputError, Interrupted, UserError
from finetune.run.launch import is_main_process, launched_processes
from finetune.terminal import terminal_text

COMMANDS = ("check", "prepare", "train", "evaluate", "merge", "export", "chat", "serve", "demo", "bench", "run")
"""In the order of a job; each is the module of its name in `finetune.commands`. `train` need not be written."""

SHARED = ("train", "evaluate", "run")
"""Commands whose work the processes of a launcher share."""

PASSING_ON = "run"
"""The command whose first argument names a program; the others are that program's, `--help` too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name = arguments.pop(0) if arguments[0] in COMMANDS else "train"
    command = import_module(f"finetune.commands.{name}")
    parser = Parser(
        prog="finetune" if name == "train" else f"finetune {name}",
        description=command.SUMMARY,
        epilog=f"examples:\n{indented(command.EXAMPLES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    own = arguments[:1] if name == PASSING_ON else arguments
    try:
        parsed = parser.parse_intermixed_args(own)
    except SystemExit as end:  # argparse has said what is wrong, or printed the help
        assert isinstance(end.code, int), end.code
        return end.code
    parsed.passed_on = arguments[len(own) :]
    prepare_output()
    try:
        if not has_work(name):
            return 0
        with stopping_on_sigterm():
            command.run(parsed)
            sys.stdout.flush()
    except (Interrupted, KeyboardInterrupt) as error:
        stopped = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT, saved=False)
        state = "the state is saved: the same command goes on" if stopped.saved else command.WHEN_STOPPED
        complain(f"interrupted by {stopped}; {stopped.said or state}")
        return stopped.exit_code
    except InputError as error:
        complain(str(error))
        return 2
    except Failed as error:
        complain(str(error))
        return 1
    except Exception as error:
        if isinstance(error, BrokenPipeError) and is_closed(sys.stdout):
            complain("stopped: the program that reads the output has ended")
        else:  # a fault of ours, or of a library
            complain(traceback.format_exc().rstrip())
        return 1
    return 0


def has_work(command: str) -> bool:
    """Whether this process of a launcher has something to do: `check` looks at a run of all of them, once.

    Raises:
        UserError: each process would do all of the work, into one folder.
    """
    processes = launched_processes()
    if processes == 1 or command in SHARED:
        return True
    if command == "check":
        return is_main_process()
    raise UserError(
        f"finetune {command} works in one process, and a launcher started {processes} (RANK and WORLD_SIZE are set): "
        "start it without one"
    )


class Parser(argparse.ArgumentParser):
    """`ArgumentParser` whose messages cannot control the terminal with what they quote."""

    def error(self, message: str) -> NoReturn:
        super().error(terminal_text(message))


def usage() -> str:
    """All commands, a line each."""
    lines = []
    for name in COMMANDS:
        word = "RECIPE" if name == "train" else name
        lines.append(f"finetune {word:<10}{import_module(f'finetune.commands.{name}').SUMMARY}")
    lines += ["", indented(import_module("finetune.commands.train").EXAMPLES), ""]
    lines.append("`finetune COMMAND --help` lists its options. Recipes are in recipes/; every key can be overridden.")
    return "\n".join(lines)


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def complain(text: str) -> None:
    """Print to stderr."""
    print(terminal_text(text), file=sys.stderr, flush=True)


class TerminalFormatter(logging.Formatter):
    """Log messages whose control characters are visible."""

    def format(self, record: logging.LogRecord) -> str:
        return terminal_text(super().format(record))


def prepare_output() -> None:
    """Say how what is printed, logged and warned of reaches the terminal."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Half a surrogate pair, a file name that is not UTF-8, or a terminal with few characters.
        sys.stdout.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:  # it prints what no handler was set up for
        logging.lastResort.setFormatter(TerminalFormatter())
    # Deprecations in the libraries' own code are for their programmers.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|trl")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, with or without 4-bit weights


def is_closed(stream: TextIO) -> bool:
    """Whether the reader of a pipe has gone (`finetune check ... | head`). Nothing more is then written to it."""
    try:
        print(file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for the flush at the interpreter's exit
        return True
    return False


@contextlib.contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """End a command by an exception on SIGTERM, so that nothing is left half done; training has its own handler."""

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        raise Interrupted(number, saved=False)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
