"""The command of an installed package, found and called in this process."""

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from finetune.errors import UserError


def find_console_script(program: str) -> EntryPoint:
    """The entry point behind a command such as `transformers` or `lm_eval`.

    Raises:
        UserError: no installed package has it.
    """
    names = list(dict.fromkeys((program, program.replace("-", "_"), program.replace("_", "-"))))
    scripts = entry_points(group="console_scripts")
    for name in names:
        if found := tuple(scripts.select(name=name)):
            return found[0]
    close = difflib.get_close_matches(program, {script.name for script in scripts}, n=3)
    meant = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise UserError(
        f"run: no installed package has a command {' or '.join(names)}{meant}. Install it into the environment of "
        f"{sys.executable}; scripts are started by `python -m finetune.programs.registered SCRIPT ARGS`"
    )


def call(script: EntryPoint, program: str, arguments: Sequence[str]) -> Any:
    """Call a command with its arguments, as its own script would; it may end by SystemExit.

    Returns:
        What it returns: its exit code.

    Raises:
        UserError: its package lacks something that it needs.
    """
    try:
        command: Callable[[], Any] = script.load()
    except ImportError as error:
        raise UserError(f"run: {program} ({script.value}) cannot be imported: {error}") from error
    before = sys.argv
    sys.argv = [program, *arguments]
    try:
        return command()
    finally:
        sys.argv = before
