"""The last lines of a run."""

import math

from finetune.terminal import labelled
from finetune.training.summary import summary


def lines(history, **about) -> list[str]:
    return [labelled(label, text) for label, text in summary(history, **about).items()]


def test_summary_of_a_run(tmp_path):
    history = [
        {"step": 0, "eval_loss": 1.421, "eval_anls": 0.412},
        {"step": 10, "loss": 2.3104, "supervised_tokens": 4000, "peak_memory_bytes": 5_300_000_000},
        {"step": 20, "loss": 0.8412, "supervised_tokens": 5000, "peak_memory_bytes": 5_200_000_000},
        {"step": 20, "eval_loss": 0.9876, "eval_anls": 0.7831, "eval_seconds": 3.0},
        {"step": 24, "eval_loss": 0.9912},
    ]
    assert lines(history, wall_seconds=7478.0, run=tmp_path, tokens=123_456, images=950) == [
        "steps       24 in 2h 04m",
        "trained on  123k tokens (9.0k supervised), 950 images",
        "loss        2.3104 -> 0.8412",
        "eval loss   1.4210 -> 0.9876 at step 20 (best), 0.9912 at the end",
        "eval anls   0.4120 -> 0.7831",
        "peak memory 5.3 GB",
        f"run         {tmp_path}",
    ]


def test_summary_of_a_run_that_logged_nothing():
    assert lines([], wall_seconds=3.0, run="runs/a") == ["steps       0 in 3s", "run         runs/a"]


def test_summary_with_losses_that_are_not_numbers():
    history = [
        {"step": 1, "loss": math.nan, "eval_loss": math.nan, "supervised_tokens": 10},
        {"step": 2, "loss": None, "eval_loss": math.nan},
    ]
    assert lines(history, wall_seconds=3.0, run="a") == [
        "steps       2 in 3s",
        "trained on  10 supervised tokens",
        "loss        nan",
        "eval loss   nan -> nan",
        "run         a",
    ]


def test_scores_of_sources_stand_behind_that_of_all():
    history = [{"step": step, "eval_anls": step / 10, "eval_anls_old": 1 - step / 10} for step in (0, 5)]
    assert "eval anls   0.0000 -> 0.5000 (old 1.0000 -> 0.5000)" in lines(history, wall_seconds=3.0, run="a")


def test_parts_and_the_step_that_is_saved():
    history = [{"step": step, "eval_loss": loss, "eval_anls": 0.5} for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0))]
    said = lines(history, wall_seconds=60, run="a", parts=3, tokens=10, images=2, supervised=4, saved_step=10)
    assert said[:3] == [
        "steps       30 in 1m 00s, in 3 parts",
        "trained on  10 tokens (4 supervised), 2 images",
        "eval loss   3.0000 -> 1.0000 at step 20 (best), 2.0000 at the end, 3.0000 at step 10, which is saved",
    ]
    assert said[3] == "eval anls   0.5000 -> 0.5000, 0.5000 at step 10, which is saved"
