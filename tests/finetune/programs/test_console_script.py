import sys
from importlib.metadata import EntryPoint

import pytest

from finetune.cli import main
from finetune.errors import UserError
from finetune.programs import class_names, console_script
from finetune.programs.console_script import find_console_script


def stand_in(monkeypatch, value: str, name: str = "some_tool"):
    """Let a function of this file be the command of a package."""
    scripts = {name: EntryPoint(name=name, value=value, group="console_scripts")}

    class Scripts(list):
        def select(self, name):
            return [scripts[name]] if name in scripts else []

    monkeypatch.setattr(class_names, "expose_class_names", lambda: None)  # nothing is left of it for other tests
    monkeypatch.setattr(console_script, "entry_points", lambda group: Scripts(scripts.values()))
    monkeypatch.setitem(sys.modules, "stand_in", sys.modules[__name__])


def says_its_arguments():
    print(sys.argv)
    return 7


def exits():
    sys.exit(3)


def test_a_program_gets_its_arguments_and_gives_its_exit_code(monkeypatch, capsys):
    stand_in(monkeypatch, "stand_in:says_its_arguments")
    before = list(sys.argv)
    with pytest.raises(SystemExit) as end:
        main(["run", "some_tool", "--help", "--model", "hf", "key=value", "--", "-x"])
    assert end.value.code == 7
    assert capsys.readouterr().out == "['some_tool', '--help', '--model', 'hf', 'key=value', '--', '-x']\n"
    assert sys.argv == before
    stand_in(monkeypatch, "stand_in:exits")
    with pytest.raises(SystemExit) as end:
        main(["run", "some-tool"])
    assert end.value.code == 3


def test_an_unknown_program_is_named_with_what_was_tried(monkeypatch, capsys):
    stand_in(monkeypatch, "stand_in:exits")
    assert main(["run", "some_tools", "--tasks", "x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "run: no installed package has a command some_tools or some-tools (did you mean some_tool?)"
    )


def test_a_program_that_cannot_be_imported(monkeypatch, capsys):
    stand_in(monkeypatch, "no_such_module_at_all:main")
    assert main(["run", "some_tool"]) == 2
    assert "some_tool (no_such_module_at_all:main) cannot be imported: No module named" in capsys.readouterr().err


def test_what_is_installed_is_found():
    assert find_console_script("trl").value == "trl.cli:main"
    with pytest.raises(UserError):
        find_console_script("")


def test_a_program_must_be_named(capsys):
    assert main(["run"]) == 2
    assert "PROGRAM" in capsys.readouterr().err
