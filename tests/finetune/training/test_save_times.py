"""When checkpoints are written, by steps, epochs and the clock."""

from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from finetune.training.save_times import SaveInTime


class Trainer:
    """Asks the callback as the trainer does: steps of `seconds` each, saves of `save` seconds."""

    def __init__(self, saves: dict, *, steps: int = 12, epoch: int = 4, seconds: float = 60, save: float = 1, by=()):
        self.now, self.by, self.seconds, self.save = 1000.0, by, seconds, save
        self.callback = SaveInTime(**{"minutes": 10, **saves}, clock=lambda: self.now)
        self.state = SimpleNamespace(global_step=0, max_steps=steps, epoch=0.0)
        self.control = TrainerControl()
        self.saved: list[int] = []
        self.passing: list[int] = []
        self.callback.on_train_begin(None, self.state, self.control)
        for step in range(1, steps + 1):
            self.now += seconds
            self.callback.heard(self.callback.wishes())
            self.state.global_step, self.state.epoch = step, step / epoch
            self.control.should_training_stop = step == steps
            self.control.should_save = step in by
            self.callback.on_step_end(None, self.state, self.control)
            self._save()
            if step % epoch == 0 or step == steps:
                self.callback.on_epoch_end(None, self.state, self.control)
                self._save()

    def _save(self) -> None:
        if not self.control.should_save:
            return
        with self.callback.measured():
            self.now += self.save
        self.saved.append(self.state.global_step)
        self.passing += [self.state.global_step] * self.callback.passing
        self.control.should_save = False
        self.callback.on_save(None, self.state, self.control)


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({}, [4, 8, 12]),  # each epoch, which is before 10 minutes are over
        ({"saves": {"minutes": 2}}, [2, 4, 6, 8, 10, 12]),
        ({"saves": {"minutes": None}, "epoch": 100}, [12]),
        ({"saves": {"never": True}, "by": ()}, []),
        ({"by": (5,)}, [4, 5, 8, 12]),
        # Once a save is known to take 10 seconds, the second one waits until both are a twentieth of the time.
        ({"saves": {"minutes": 1}, "save": 10}, [1, 7, 10, 12]),
        # A checkpoint that is expected to take as long is not written sooner either.
        ({"saves": {"expected_bytes": 10 * 500e6}, "save": 10}, [4, 8, 12]),
        ({"saves": {"expected_bytes": 40 * 500e6}, "save": 10}, [12]),
    ],
)
def test_steps_that_are_saved(settings, saved):
    assert Trainer(**{"saves": {}, **settings}).saved == saved


def test_what_the_recipe_asks_for_is_not_put_off():
    slow = {"save": 100, "by": (1, 2, 3, 12)}
    assert Trainer({"asked": True}, **slow).saved == [1, 2, 3, 12]
    assert Trainer({}, **slow).saved == [1, 12]  # TRL's own number of steps is


def test_what_the_time_asks_for_passes_where_the_recipe_says_when_to_save():
    asked = Trainer({"asked": True, "minutes": 3}, by=(5, 12))
    assert (asked.saved, asked.passing) == ([3, 4, 5, 8, 11, 12], [3, 4, 8, 11])
    assert Trainer({"minutes": 3}, by=(5, 12)).passing == []


def test_saves_take_a_twentieth_of_the_time():
    run = Trainer({"minutes": 0.1}, steps=2000, epoch=7, seconds=3, save=2)
    assert len(run.saved) > 30 and 2 * (len(run.saved) - 1) <= 0.05 * (run.now - 1000)
