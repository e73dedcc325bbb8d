"""The seconds of a run by phase: none counted twice, none left out."""

import json
from datetime import datetime
from types import SimpleNamespace

import pytest
from recipes_for_tests import write_recipe

from finetune.errors import UserError
from finetune.recipe import load_recipe
from finetune.terminal import say_nothing
from finetune.training.phases import Phases
from finetune.training.train import train


class Clock:
    """Stands still between two waits."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float):
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def seconds(phases: Phases) -> dict[str, tuple[float, int]]:
    return {name: (phase["seconds"], phase["times"]) for name, phase in phases.record().items()}


def test_a_phase_lasts_until_the_next(clock):
    phases = Phases("read", clock)
    clock.wait(2)
    phases.begin("load")
    clock.wait(5)
    assert seconds(phases) == {"read": (2, 1), "load": (5, 1)}
    clock.wait(1)  # a record does not end the phase there is
    phases.begin("load")
    clock.wait(3)
    phases.begin("read")
    clock.wait(4)
    assert seconds(phases) == {"read": (6, 2), "load": (9, 1)}


def test_moments_of_the_first_and_the_last_time(clock):
    phases = Phases("a", clock)
    for name in "bab":
        clock.wait(1)
        phases.begin(name)
    clock.wait(1)
    record = phases.record()
    moments = [record["a"]["began"], record["b"]["began"], record["a"]["ended"], record["b"]["ended"]]
    assert moments == sorted(set(moments)) and all(moment.endswith("+00:00") for moment in moments)


def events(phases: Phases, clock: Clock, *names: str, evaluates=False, saves=False):
    """What the trainer calls, a second apart."""
    control = SimpleNamespace(should_evaluate=evaluates, should_save=saves)
    for name in names:
        getattr(phases, f"on_{name}")(None, None, control)
        clock.wait(1)


STEP = ("step_begin", "pre_optimizer_step", "step_end")


def test_the_events_of_the_trainer(clock):
    phases = Phases("load", clock)
    clock.wait(1)
    events(phases, clock, "train_begin", *STEP)
    events(phases, clock, *STEP, saves=True)
    events(phases, clock, "save", *STEP)
    events(phases, clock, "epoch_end", evaluates=True)
    events(phases, clock, "evaluate", saves=True)
    events(phases, clock, "save")
    assert seconds(phases) == {
        "load": (1, 1),
        "batches": (5, 5),
        "forward_backward": (3, 3),
        "optimizer": (3, 3),
        "checkpoint": (2, 2),
        "evaluate": (1, 1),
    }


def test_a_run_notes_them(tmp_path):
    evaluate = {"data": {"path": str(tmp_path / "eval.jsonl"), "format": "messages"}, "predictions": 1}
    recipe = write_recipe(tmp_path, evaluate=evaluate, train__eval_strategy="steps", train__eval_steps=4)
    run = train(load_recipe(recipe), say=say_nothing)
    description = json.loads((run / "run.json").read_text())
    phases = description["phases"]
    assert list(phases)[:4] == ["read", "load", "evaluate", "batches"] and list(phases)[-1] == "save"
    assert {name: phase["times"] for name, phase in phases.items() if name not in ("batches", "read", "load")} == {
        "forward_backward": 8,
        "optimizer": 8,
        "checkpoint": 4,  # after every second step
        "evaluate": 4,  # replies before and after, losses at steps 4 and 8
        "save": 1,
    }
    whole = datetime.fromisoformat(phases["evaluate"]["ended"]) - datetime.fromisoformat(phases["read"]["began"])
    rounded = 0.001 * (len(phases) + 2)
    assert sum(phase["seconds"] for phase in phases.values()) == pytest.approx(whole.total_seconds(), abs=rounded)


def test_a_run_that_fails_notes_them_too(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise UserError("no")

    monkeypatch.setattr("finetune.training.train.save_result", fail)
    with pytest.raises(UserError):
        train(load_recipe(write_recipe(tmp_path, train__max_steps=1)), say=say_nothing)
    description = json.loads((tmp_path / "run" / "run.json").read_text())
    assert description["status"] == "failed" and "forward_backward" in description["phases"]
