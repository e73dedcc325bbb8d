"""A signal inside of a step, of an evaluation's losses or of its replies: what goes on afterwards is the same run."""

import json
import os
import signal
from pathlib import Path

import pytest
from recipes_for_tests import scored_questions, write_recipe
from said import collect

from finetune.errors import Interrupted
from finetune.recipe import load_recipe
from finetune.replies.growing_replies import GrowingReplies
from finetune.run.folder import RunFolder
from finetune.training import interrupts
from finetune.training.checkpoint_note import NOTE, read_note
from finetune.training.step_in_packs import StepInPacks
from finetune.training.train import train
from finetune.training.trainer import QwenVLTrainer

STEPS = {"train__eval_strategy": "steps", "train__eval_steps": 2}
EPOCHS = {"train__eval_strategy": "epoch"}


def make(folder: Path, **changes) -> Path:
    """Four steps an epoch, of four micro-batches; it ends inside of the second epoch, and logs each third step."""
    folder.mkdir(parents=True, exist_ok=True)
    evaluate = scored_questions(folder, 3)
    settings = {"evaluate": evaluate, "train__max_steps": 6, "train__logging_steps": 3, "train__save_steps": 500}
    return write_recipe(folder, **settings | changes)


def run(file: Path) -> Path:
    return train(load_recipe(file), say=collect([]))


def result(folder: Path) -> dict:
    """All that must be equal."""
    timed = ("tokens_per_second", "images_per_second", "peak_memory_bytes", "eval_seconds")
    records = [
        {key: value for key, value in record.items() if key not in timed}
        for record in RunFolder(folder).read_metrics()
        if "train_runtime" not in record
    ]
    facts = json.loads((folder / "run.json").read_text())
    best = facts["best_checkpoint"] and Path(facts["best_checkpoint"]).name
    kept = {key: facts[key] for key in ("steps", "trained_on", "score", "status")}
    return {
        "records": records,
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "best": best,
        **kept,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, each made when it is asked for."""
    done = {}

    def get(name, changes):
        if name not in done:
            done[name] = result(run(make(tmp_path_factory.mktemp(name), **changes)))
        return done[name]

    return get


def signal_at(monkeypatch, where: str, call: int) -> list[str]:
    """A real signal at the nth call of a function, in training; returns what is called from then on."""
    called: list[str] = []
    counts = dict.fromkeys(("batch", "loss", "token"), 0)

    def patch(owner, name, kind):
        original = getattr(owner, name)

        def watched(self, *args, **kwargs):
            if kind == "batch" or counts["batch"]:
                counts[kind] += 1
                if called:
                    called.append(kind)
                if kind == where and counts[kind] == call:
                    os.kill(os.getpid(), signal.SIGTERM)
                    called.append("signal")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    patch(StepInPacks, "run", "batch")
    patch(QwenVLTrainer, "_loss_of_pack", "loss")
    patch(GrowingReplies, "next", "token")
    return called


@pytest.mark.parametrize(
    ("name", "changes", "where", "call", "step", "owed"),
    [
        ("steps", STEPS, "batch", 10, 2, None),  # in the third step
        ("steps", STEPS, "loss", 1, 2, "step"),
        pytest.param("epochs", EPOCHS, "token", 2, 4, "epoch", marks=pytest.mark.slow),
        pytest.param("steps", STEPS, "token", 3, 2, "step", marks=pytest.mark.slow),
        pytest.param("steps", STEPS, "loss", 2, 4, "step", marks=pytest.mark.slow),  # and the end of an epoch
        pytest.param("steps", STEPS, "loss", 3, 6, "step", marks=pytest.mark.slow),  # the last step
        pytest.param("epochs", EPOCHS, "loss", 1, 4, "epoch", marks=pytest.mark.slow),
        pytest.param("epochs", EPOCHS, "token", 6, 6, "epoch", marks=pytest.mark.slow),
        pytest.param("epochs", EPOCHS, "batch", 14, 3, None, marks=pytest.mark.slow),  # a step's last micro-batch
    ],
)
def test_a_signal_anywhere(whole, tmp_path, monkeypatch, name, changes, where, call, step, owed):
    file = make(tmp_path, **changes)
    with monkeypatch.context() as patch:
        called = signal_at(patch, where, call)
        with pytest.raises(Interrupted) as stopped:
            run(file)
    assert stopped.value.exit_code == 143 and stopped.value.saved
    assert called == ["signal"], "nothing is computed after the signal"
    last = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    assert last.name == f"step-{step}" and read_note(last).owed == owed
    assert result(run(file)) == whole(name, changes)
    assert all(read_note(path).owed != "step" for path in (tmp_path / "run" / "checkpoints").iterdir())


def test_before_the_first_step_is_done_there_is_nothing_to_save(tmp_path, monkeypatch):
    file = make(tmp_path, evaluate=None)
    with monkeypatch.context() as patch:
        signal_at(patch, "batch", 2)
        with pytest.raises(Interrupted) as stopped:
            run(file)
    assert not stopped.value.saved and stopped.value.said == "no state is saved: the same command starts again"
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    file = make(tmp_path, evaluate=None, train__save_steps=1)
    original = StepInPacks.run

    def twice(self, *args, **kwargs):
        if list((tmp_path / "run" / "checkpoints").glob("step-2")):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(interrupts, "ONE_SIGNAL_SECONDS", 0)
    monkeypatch.setattr(StepInPacks, "run", twice)
    with pytest.raises(Interrupted) as stopped:
        run(file)
    assert stopped.value.exit_code == 130 and "the state after step 2 is saved" in str(stopped.value.said)


def test_a_run_killed_at_its_last_step_trains_no_step_more(tmp_path):
    """Its last step is inside of an epoch."""
    file = make(tmp_path, evaluate=None, train__max_steps=2)
    folder = run(file)
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**facts, "status": "running"}))
    for note in folder.glob(f"checkpoints/*/{NOTE}"):
        assert json.loads(note.read_text())["owed"] is None
    run(file)
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    facts = json.loads((folder / "run.json").read_text())
    assert facts["steps"] == 2 and facts["parts"] == 2
