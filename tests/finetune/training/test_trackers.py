"""What trackers are told, and where they keep it."""

import json
import os
import sys
from types import ModuleType

import pytest
from recipes_for_tests import write_recipe
from said import collect
from transformers.integrations import integration_utils

from finetune.recipe import load_recipe
from finetune.training.settings_check import TRACKERS
from finetune.training.trackers import trackers_in
from finetune.training.train import train


def test_what_the_user_has_set_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", "/elsewhere")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    before = dict(os.environ)
    with trackers_in(tmp_path):
        assert os.environ["WANDB_DIR"] == "/elsewhere"
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "tensorboard")
    assert dict(os.environ) == before


@pytest.fixture
def tensorboard(monkeypatch):
    """Transformers' own callback, over a writer that keeps what it is given."""
    made = []

    class SummaryWriter:
        def __init__(self, log_dir=None):
            self.log_dir, self.texts, self.scalars = log_dir, {}, []
            made.append(self)

        def add_text(self, name, text, *step):
            self.texts[name] = text

        def add_scalar(self, name, value, step):
            self.scalars.append((name, step))

        def flush(self):
            pass

        close = flush

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(TRACKERS, "tensorboard", (lambda: True, "tensorboard"))
    return made


def test_tensorboard_is_in_the_runs_folder_and_knows_the_recipe(tmp_path, monkeypatch, tensorboard):
    monkeypatch.chdir(tmp_path)
    rows = {"data": [{"path": str(tmp_path / "eval.jsonl"), "format": "messages"}], "predictions": 0}
    file = write_recipe(tmp_path, train__max_steps=1, train__report_to="tensorboard", evaluate=rows)
    run = train(load_recipe(file), say=collect([]))
    (writer,) = tensorboard
    assert writer.log_dir == str(run / "tensorboard") and ("train/loss", 1) in writer.scalars
    told = json.loads(writer.texts["args"])
    assert told["recipe.adapter.r"] == 4 and told["recipe.data.train.0.format"] == "messages"
    assert told["rows.train.kept"] == 14 and told["parameters.trained"] > 0
    assert told["learning_rate"] == 1e-2  # Transformers' own are there too
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.jsonl", "recipe.yaml", "run", "train.jsonl"]
