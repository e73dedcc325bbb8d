"""The command line: `finetune RECIPE [key.path=value ...]`, and `finetune COMMAND ...` for the rest of the way.

Exit codes: 0 done, 1 failed, 2 the user's input is wrong, 130 / 143 interrupted with the state saved.
"""

import argparse
import contextlib
import logging
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module

from finetune.errors import Failed, Interrupted, UserError
from finetune.recipe import RecipeError

COMMANDS = ("check", "prepare", "train", "evaluate", "merge", "export", "chat", "bench")
"""In the order of a job; each is the module of its name in `finetune.commands`. `train` need not be written."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name = arguments.pop(0) if arguments[0] in COMMANDS else "train"
    command = import_module(f"finetune.commands.{name}")
    parser = argparse.ArgumentParser(
        prog="finetune" if name == "train" else f"finetune {name}",
        description=command.SUMMARY,
        epilog=f"examples:\n{indented(command.EXAMPLES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    try:
        parsed = parser.parse_intermixed_args(arguments)
    except SystemExit as told:  # argparse has said what is wrong, or printed the help that was asked for
        return told.code
    # What the libraries tell programmers, about names that they will drop, is not for the reader of a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|trl")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, with or without 4-bit weights
    try:
        with stopping_on_sigterm():
            command.run(parsed)
    except (Interrupted, KeyboardInterrupt) as stopped:
        if isinstance(stopped, KeyboardInterrupt):
            stopped = Interrupted(signal.SIGINT, saved=False)
        state = "the state is saved: the same command goes on" if stopped.saved else command.WHEN_STOPPED
        print(f"interrupted by {stopped}; {state}", file=sys.stderr)
        return stopped.exit_code
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    except (RecipeError, UserError) as error:
        print(error, file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        # The same types come out of libraries that trip over a fault of ours; those keep their traceback.
        if not raised_by_us(error):
            raise
        print(error, file=sys.stderr)
        return 2
    return 0


def usage() -> str:
    """All commands, a line each."""
    lines = []
    for name in COMMANDS:
        word = "RECIPE" if name == "train" else name
        lines.append(f"finetune {word:<10}{import_module(f'finetune.commands.{name}').SUMMARY}")
    lines += ["", indented(import_module("finetune.commands.train").EXAMPLES), ""]
    lines.append(
        "`finetune COMMAND --help` has the words of each. Recipes are in recipes/; every key can be overridden."
    )
    return "\n".join(lines)


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


@contextlib.contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """SIGTERM ends what is under way as an exception, so that nothing half done is left; training has its own way."""

    def stop(number, _frame):
        raise Interrupted(number, saved=False)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def raised_by_us(error: BaseException) -> bool:
    """Whether an error was raised in this project's own code, as its messages to users are."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    package = frame.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    return package in ("finetune", "qwenvl")


if __name__ == "__main__":
    sys.exit(main())
