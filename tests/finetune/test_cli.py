"""How a command ends: its exit code, and what it says."""

import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli import COMMANDS, main
from finetune.errors import Failed, InputError, Interrupted, MissingFileError, UserError
from finetune.files.disk_space import NotEnoughDiskSpace
from finetune.files.path_errors import DiskError, PathError
from finetune.recipe import Place, Problem, RecipeError
from finetune.run.lock import RunLocked

ROOT = Path(__file__).parents[2]
TITLE = "\x1b]0;title\x07"  # sets the title of a terminal


def raising(error: BaseException):
    def run(_):
        raise error

    return run


def end_of(monkeypatch, error: BaseException) -> int:
    """The exit code of a command that raises this error."""
    monkeypatch.setattr("finetune.commands.check.run", raising(error))
    return main(["check", "recipe.yaml"])


USER_ERRORS = [
    UserError("give another"),
    InputError("give another"),
    MissingFileError("give another"),
    NotEnoughDiskSpace("give another"),
    PathError("a", "write", OSError(errno.EROFS, "Read-only file system")),
    RecipeError([Problem(Place("a.yaml", 3), "train.lr", "unknown key"), Problem(Place("a.yaml", 5), "x", "bad")]),
    RunLocked(Path("run"), {}),
]


@pytest.mark.parametrize("error", USER_ERRORS, ids=lambda error: type(error).__name__)
def test_what_the_user_can_put_right_is_one_message(monkeypatch, capsys, error):
    assert end_of(monkeypatch, error) == 2
    assert capsys.readouterr() == ("", f"{error}\n")


@pytest.mark.parametrize(
    "error", [Failed("no room"), DiskError(Path("a"), OSError(errno.ENOSPC, "No space left on device"))]
)
def test_failed(monkeypatch, capsys, error):
    assert end_of(monkeypatch, error) == 1
    assert capsys.readouterr() == ("", f"{error}\n")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Interrupted(signal.SIGTERM, saved=True), 143, "interrupted by SIGTERM; the state is saved"),
        (Interrupted(signal.SIGTERM, saved=False), 143, "interrupted by SIGTERM; a check changes nothing"),
        (KeyboardInterrupt(), 130, "interrupted by SIGINT; a check changes nothing"),
    ],
)
def test_interrupted(monkeypatch, capsys, error, code, said):
    assert end_of(monkeypatch, error) == code
    assert capsys.readouterr().err.startswith(said)


FAULTS = [
    ValueError("not for the user"),
    OSError(errno.EACCES, "Permission denied", "a"),
    FileNotFoundError("not for the user"),
    AssertionError("not for the user"),
    KeyError("not for the user"),
]


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_fault_shows_where_it_is(monkeypatch, capsys, error):
    assert end_of(monkeypatch, error) == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback (most recent call last):\n")
    assert f"{type(error).__name__}: {error}" in told
    assert __file__ in told


FAULT = """
import sys
import finetune.recipe
import finetune.commands.check as command
from finetune.cli import main

# In a module of ours, in the middle of a command.
command.load_recipe = lambda *_: list(zip([1], [], strict=True))
sys.exit(main(["check", "recipe.yaml"]))
"""


def in_a_process(program: str, **options) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", program], env=environment, text=True, check=False, **options)


def test_a_fault_in_a_process_of_its_own():
    done = in_a_process(FAULT, capture_output=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("ValueError: zip() argument 2 is shorter than argument 1\n")
    assert "During handling" not in done.stderr


@pytest.mark.parametrize("error", [UserError(f"a {TITLE}\nb"), Failed(f"a {TITLE}\nb"), ValueError(f"a {TITLE}\nb")])
def test_no_message_controls_the_terminal(monkeypatch, capsys, error):
    end_of(monkeypatch, error)
    told = capsys.readouterr().err
    assert told.endswith("a ␛]0;title␇\nb\n")


@pytest.mark.parametrize(
    "arguments",
    [["check", "a", "--samples", TITLE], ["check", "a", f"--{TITLE}"], ["merge", "a", "--to", "b", f"--{TITLE}"]],
)
def test_no_argument_controls_the_terminal(capsys, arguments):
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert "\x1b" not in told and "\x07" not in told
    assert "title" in told


def test_no_log_line_controls_the_terminal(monkeypatch, capsys):
    def run(_):
        logging.getLogger("finetune.somewhere").warning("left out %s", TITLE)

    monkeypatch.setattr("finetune.commands.check.run", run)
    # pytest has handlers of its own; without any, this one of the standard library prints.
    monkeypatch.setattr(logging.getLogger("finetune"), "handlers", [logging.lastResort])
    assert main(["check", "recipe.yaml"]) == 0
    assert capsys.readouterr().err == "left out ␛]0;title␇\n"


def test_names_that_are_not_utf8_are_printed():
    program = "import sys\nimport finetune.commands.check as command\nfrom finetune.cli import main\n"
    program += r"command.run = lambda _: print('a\udcffb')" + "\nsys.exit(main(['check', 'recipe.yaml']))"
    done = in_a_process(program, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a\\udcffb\n", "")


def test_a_reader_that_ends_early_is_no_fault():
    """`finetune check recipe.yaml | head -1`"""
    program = "import sys\nimport finetune.commands.check as command\nfrom finetune.cli import main\n"
    program += "command.run = lambda _: [print(n) for n in range(100_000)]\nsys.exit(main(['check', 'recipe.yaml']))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 1
    assert told == "stopped: the program that reads the output has ended\n"


def test_a_broken_pipe_of_another_kind_is_a_fault(monkeypatch, capsys):
    assert end_of(monkeypatch, BrokenPipeError(errno.EPIPE, "Broken pipe")) == 1
    assert capsys.readouterr().err.startswith("Traceback")


def test_help_of_every_command(capsys):
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        told = capsys.readouterr().out
        assert told.startswith(f"usage: finetune {'' if name == 'train' else name}")
        assert name == "train" or f"finetune {name} " in usage


def test_a_typo_is_answered_without_anything_heavy():
    program = (
        "import sys\nfrom finetune.cli import main\n"
        "codes = [main([{recipe!r}, 'train.max_stpes=3'])]\n"
        "codes += [main(['evaluate', 'x', '--task', 'docvqq', '--data', 'y'])]\n"
        "heavy = [name for name in ('torch', 'transformers', 'datasets', 'PIL') if name in sys.modules]\n"
        "print(codes, heavy)"
    ).format(recipe=str(ROOT / "recipes" / "quickstart.yaml"))
    done = in_a_process(program, capture_output=True)
    assert done.stdout == "[2, 2] []\n", done.stderr
    assert "did you mean train.max_steps?" in done.stderr


@pytest.mark.parametrize("command", ["chat", "merge", "export", "prepare", "bench"])
def test_a_command_of_one_process_under_a_launcher(monkeypatch, capsys, command):
    """Each process would do all of the work, into one folder."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = {
        "prepare": ["recipe.yaml", "--to", "there"],
        "export": ["a", "--to", "qwen2"],
        "merge": ["a", "--to", "b"],
    }
    assert main([command, *words.get(command, ["recipe.yaml"])]) == 2
    assert f"finetune {command} works in one process, and a launcher started 2" in capsys.readouterr().err


def test_a_check_under_a_launcher_is_of_the_main_process(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["check", "not-there.yaml"]) == 0
    monkeypatch.setenv("RANK", "0")
    assert main(["check", "not-there.yaml"]) == 2
    assert capsys.readouterr().err.count("not-there.yaml") == 1
