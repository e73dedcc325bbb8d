"""A fault of ours inside the places that word users' errors keeps its traceback: it is never shown as the user's."""

import pytest
from recipes_for_tests import TINY, write_recipe

from finetune.cli import main
from finetune.data.checks.rules import Rules
from finetune.files.checkpoint_folder import read_config, read_tokenizer
from finetune.merge.check import prompt_of_base
from qwenvl import QwenVLConfig, QwenVLTokenizer


def mismatch(*_, **__):
    return list(zip([1], [], strict=True))


def test_in_the_check_of_data(tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, data__on_bad_row="skip", data__workers=0)
    monkeypatch.setattr(Rules, "fit", mismatch)
    monkeypatch.setattr("finetune.data.worker_processes.default_processes", lambda: 1)
    assert main(["check", str(recipe)]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "zip() argument 2" in said


def test_in_a_checkpoints_files(monkeypatch):
    monkeypatch.setattr(QwenVLTokenizer, "from_pretrained", mismatch)
    with pytest.raises(ValueError, match="zip") as told:
        read_tokenizer(TINY)
    assert type(told.value) is ValueError
    monkeypatch.setattr(QwenVLConfig, "from_pretrained", mismatch)
    with pytest.raises(ValueError, match="zip") as told:
        read_config(TINY)
    assert type(told.value) is ValueError


def test_in_the_check_of_a_merge(monkeypatch):
    monkeypatch.setattr("finetune.merge.check.sample_prompt", mismatch)
    with pytest.raises(ValueError, match="zip") as told:
        prompt_of_base(str(TINY), visual=True)
    assert type(told.value) is ValueError
