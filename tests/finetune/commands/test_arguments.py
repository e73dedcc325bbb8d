"""The types of arguments, and places to write that every command refuses before it begins."""

import argparse
import ast
import re
from pathlib import Path

import pytest

import finetune.commands
from finetune.cli import COMMANDS, main
from finetune.commands.arguments import count, non_negative, pixels, size

ROOT = Path(__file__).parents[3]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [(count, "12", 12), (pixels, "448", 448), (non_negative, "0", 0.0), (non_negative, "1e-1", 0.1)]
    + [(size, "5GB", 5e9), (size, "1.5 tb", 1.5e12), (size, "500MB", 5e8)],
)
def test_values(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "texts", "message"),
    [
        (count, ["0", "-1", "1.5", "", "x", "²", "1_0"], "must be a whole number from 1, not "),
        (pixels, ["0", "448px"], "must be a number of pixels from 1, not "),
        (non_negative, ["-0.1", "inf", "nan", "x", ""], "must be a number from 0, not "),
        (size, ["5", "GB", "0GB", "5 kilobytes", "-1GB", "9" * 400 + "GB"], " is not a size such as 5GB or 500MB"),
    ],
)
def test_texts_that_are_refused(kind, texts, message):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            kind(text)


def test_no_command_imports_another():
    for name in COMMANDS:
        file = Path(finetune.commands.__file__).with_name(f"{name}.py")
        imported = {node.module for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)}
        assert not imported & {f"finetune.commands.{other}" for other in COMMANDS}


WRITING = {
    "output": [QUICKSTART, "output={}"],
    "prepare --to": ["prepare", QUICKSTART, "--to", "{}"],
    "bench --to": ["bench", QUICKSTART, "--to", "{}"],
    "evaluate --out": ["evaluate", "m", "--task", "docvqa", "--data", "rows.jsonl", "--out", "{}"],
    "export --out": ["export", "m", "--to", "nf4", "--out", "{}"],
    "merge --to": ["merge", "adapter", "--to", "{}"],
    "check --html": ["check", QUICKSTART, "--html", "{}"],
    "chat --boxes": ["chat", "m", "--boxes", "{}"],
}


@pytest.mark.parametrize("option", WRITING)
def test_a_place_to_write_is_refused_at_once(tmp_path, monkeypatch, capsys, option):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("finetune.commands.merge.find_adapter", lambda _: None)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nothing")
    for path, reason in (
        (tmp_path / "file" / "below", f"{tmp_path / 'file'} is a file. Give another f"),
        (tmp_path / "link" / "below", f"{tmp_path / 'link'} is a symbolic link to nothing, which does not exist"),
        (tmp_path / ("x" * 300), "the name is too long. Give another f"),
    ):
        assert main([word.format(path) for word in WRITING[option]]) == 2
        told = capsys.readouterr().err
        assert re.fullmatch(rf"cannot write the .* to {path}: {reason}(.*\n)", told), told
        assert told.endswith(f" with {option.split()[-1]}\n")
        assert told.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
