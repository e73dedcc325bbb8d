"""The quickstart's data: what its README's commands make is what is in the repository, and all of it can be used."""

import json
import re
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from recipes_for_tests import ROOT

sys.path.insert(0, str(ROOT))  # the examples are not installed

from examples.nano.making.documents.__main__ import main
from finetune.data.checks.checking import check_samples
from finetune.data.samples import Samples

QUICKSTART = ROOT / "examples" / "quickstart"
ROWS = {"boarding/train": 400, "boarding/test": 100, "known/train": 400, "known/test": 100}


def rows(name):
    return [json.loads(line) for line in (QUICKSTART / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_commands_make_it_again(tmp_path, capsys):
    commands = re.findall(
        r"^python -m examples.nano.making.documents (.*)$", (QUICKSTART / "README.md").read_text(), re.M
    )
    assert len(commands) == len(ROWS)
    for command in commands:
        assert main(shlex.split(command.replace("examples/quickstart", str(tmp_path)))) == 0
    made = files(tmp_path)
    assert made == [name for name in files(QUICKSTART) if name != "README.md"]
    for name in made:
        if name.endswith(".png"):
            ours, theirs = (np.asarray(Image.open(folder / name).convert("RGB")) for folder in (QUICKSTART, tmp_path))
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert (QUICKSTART / name).read_bytes() == (tmp_path / name).read_bytes()


def test_it_is_small():
    assert sum(path.stat().st_size for path in QUICKSTART.rglob("*")) < 5_000_000


@pytest.mark.parametrize("name", ROWS)
def test_every_row_can_be_trained_on(published_tokenizer, name):
    settings = {
        "columns": {},
        "prompt": None,
        "box_form": None,
        "config": None,
        "split": None,
        "streaming": False,
        "encoding": None,
        "delimiter": None,
        "annotations": None,
        "part": None,
    }
    source = SimpleNamespace(
        path=str(QUICKSTART / f"{name}.jsonl"), format="messages", weight=1.0, limit=None, **settings
    )
    found = check_samples(Samples([source]), published_tokenizer, max_length=1024)
    assert len(found.kept) == found.total == ROWS[name]
    assert found.supervised.min() >= 2


def test_the_new_documents_are_of_a_kind_of_their_own():
    assert {row["family"] for row in rows("boarding/train") + rows("boarding/test")} == {"boarding"}
    assert "boarding" not in {row["family"] for row in rows("known/train") + rows("known/test")}


@pytest.mark.parametrize("source", ["boarding", "known"])
def test_questions_are_about_pages_that_are_not_trained_on(source):
    pages = {
        split: {
            (QUICKSTART / source / image).read_bytes() for row in rows(f"{source}/{split}") for image in row["images"]
        }
        for split in ("train", "test")
    }
    assert not pages["train"] & pages["test"]
