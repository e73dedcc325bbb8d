"""The task's score in training: what is logged, what it decides, and what it leaves alone."""

import json
import signal
from pathlib import Path

import pytest
import torch
from forked_ranks import finetune_on
from recipes_for_tests import IMAGES, write_recipe
from safetensors.torch import load_file
from said import collect

from finetune.errors import Interrupted, UserError
from finetune.evaluation import task_evaluation
from finetune.evaluation.task_evaluation import score_line
from finetune.metrics import anls
from finetune.recipe import load_recipe
from finetune.training.best_checkpoint import evaluations_since_best
from finetune.training.interrupts import StopOnSignal
from finetune.training.train import train

STEPS = {"train__eval_strategy": "steps", "train__eval_steps": 1, "train__save_steps": 1, "train__max_steps": 6}


def write_questions(file: Path, count: int = 5) -> Path:
    rows = [
        {"image": str(IMAGES[n % len(IMAGES)]), "question": f"Number {n}? " * (1 + n % 3), "answers": ["Answer", "a"]}
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe(folder: Path, evaluate: dict | None = None, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = {"path": str(write_questions(folder / "questions.jsonl")), "format": "vqa"}
    section = {"data": [data], "task": "docvqa", "predictions": 2, "max_new_tokens": 4}
    return write_recipe(folder, **{"evaluate": {**section, **(evaluate or {})}, **STEPS, **changes})


def run(file: Path, *overrides: str) -> tuple[Path, list[str]]:
    said: list[str] = []
    return train(load_recipe(file, overrides), say=collect(said)), said


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = adapter(one), adapter(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def planned(monkeypatch):
    """Let the scores of the evaluations, the first before training, be what a test says."""
    score = task_evaluation.score_records

    def plan(*totals: float):
        left = list(totals)

        def scored(*arguments):
            found = score(*arguments)
            object.__setattr__(found, "total", left.pop(0))
            return found

        monkeypatch.setattr(task_evaluation, "score_records", scored)
        return left

    return plan


def test_the_score_is_logged_before_training_and_at_each_evaluation(tmp_path):
    done, said = run(recipe(tmp_path), "train.max_steps=2")
    scores = {record["step"]: record["eval_anls"] for record in records(done) if "eval_anls" in record}
    assert list(scores) == [0, 1, 2]
    description = json.loads((done / "run.json").read_text())
    unread = description["score"].pop("unread")
    assert unread.keys() == {"before", "after"} and all(0 <= count <= 5 for count in unread.values())
    assert description["score"] == {"metric": "anls", "questions": 5, "before": scores[0], "after": scores[2]}
    assert any(line.startswith(f"anls        {scores[0]:.4f} -> {scores[2]:.4f} on 5 questions") for line in said)
    assert "eval task   docvqa: anls on 5 questions" in said
    pairs = records(done, "predictions.jsonl")
    assert [(record["when"], record["origin"][-5:]) for record in pairs] == [
        (when, row) for when in ("before", "after") for row in ("row 1", "row 2")
    ]
    for record in pairs:
        assert record["score"] == anls(record["prediction"], ["Answer", "a"])
        assert record["target"] == "Answer" and record["others"] == ["a"]
    report = (done / "report.html").read_text()
    assert "Evaluation: anls" in report and report.count(">score ") == 4 and "also right: a" in report


@pytest.mark.parametrize("save_steps", [1, 50], ids=["every step", "at the best only"])
def test_the_result_is_the_checkpoint_of_the_best_score(tmp_path, planned, save_steps):
    """Greater is better; after two evaluations without, patience ends it."""
    left = planned(0.9, 0.1, 0.3, 0.2, 0.29, 0.5, 0.6)
    done, said = run(recipe(tmp_path, {"patience": 2}), f"train.save_steps={save_steps}")
    description = json.loads((done / "run.json").read_text())
    # The score before training is no checkpoint's. The result is that of step 2, which is scored once more.
    assert description["steps"] == 4 and len(left) == 1
    assert description["best_checkpoint"].endswith("step-2")
    assert description["score"]["before"] == 0.9 and description["score"]["after"] == 0.5
    assert f"adapter     {done / 'adapter'}, of step 2: the best eval_anls" in said
    stored = load_file(Path(description["best_checkpoint"]) / "adapter_model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in adapter(done).items())


def test_the_best_score_needs_no_patience_and_can_be_declined(tmp_path, planned):
    planned(0.9, 0.1, 0.3, 0.2, 0.3)
    best, _ = run(recipe(tmp_path / "best"), "train.max_steps=3", "train.save_steps=50")
    assert json.loads((best / "run.json").read_text())["best_checkpoint"].endswith("step-2")
    planned(0.9, 0.1, 0.3, 0.2)
    last, said = run(recipe(tmp_path / "last"), "train.max_steps=3", "train.load_best_model_at_end=false")
    description = json.loads((last / "run.json").read_text())
    assert description["score"]["after"] == 0.2 and description["best_checkpoint"] is None
    assert f"adapter     {last / 'adapter'}" in said and not same_weights(best, last)


def test_training_is_the_same_bit_for_bit_with_and_without(tmp_path):
    """Dropout is on: replies that took a random number or left the model in eval mode would change what is learned."""
    with_task, _ = run(recipe(tmp_path / "with"), "train.max_steps=3", "train.load_best_model_at_end=false")
    without, _ = run(
        recipe(tmp_path / "without"),
        "train.max_steps=3",
        "evaluate=null",
        "train.eval_strategy=no",
        "train.eval_steps=null",
    )
    losses = [[record["loss"] for record in records(folder) if "loss" in record] for folder in (with_task, without)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert same_weights(with_task, without)


def test_a_resumed_run_scores_and_stops_as_an_uninterrupted_one(tmp_path, planned, monkeypatch):
    """Stopped one evaluation before patience ends it, it ends at the same step; the score before training stays."""
    scores = (0.9, 0.1, 0.3, 0.2, 0.25, 0.5)
    planned(*scores)
    whole, _ = run(recipe(tmp_path / "whole", {"patience": 2}))
    left = planned(*scores)
    stopping = recipe(tmp_path / "stopped", {"patience": 2})
    with monkeypatch.context() as patch:
        step_end = StopOnSignal.on_step_end

        def stop_at_step_3(self, args, state, control, **kwargs):
            if state.global_step == 3:
                self.received = signal.SIGTERM
            return step_end(self, args, state, control, **kwargs)

        patch.setattr(StopOnSignal, "on_step_end", stop_at_step_3)
        with pytest.raises(Interrupted):
            run(stopping)
    assert len(left) == 3  # that of step 3 is abandoned, and made after the resume
    resumed, said = run(stopping)
    assert any("from step 3" in line for line in said) and not left
    ours, theirs = (json.loads((folder / "run.json").read_text()) for folder in (resumed, whole))
    assert ours["steps"] == theirs["steps"] == 4 and ours["score"] == theirs["score"]
    assert ours["score"]["before"] == 0.9 and same_weights(resumed, whole)
    logged = [
        [record.get("eval_anls") for record in records(folder) if "eval_anls" in record] for folder in (resumed, whole)
    ]
    assert logged[0] == logged[1] == [0.9, 0.1, 0.3, 0.2, 0.25]


def test_a_sample_is_drawn_by_the_seed_and_stays(tmp_path, monkeypatch):
    asked = []
    score = task_evaluation.score_records
    monkeypatch.setattr(
        task_evaluation,
        "score_records",
        lambda task, questions, own: asked.append([record["id"] for record in own]) or score(task, questions, own),
    )
    done, said = run(recipe(tmp_path, {"sample": 3}), "train.max_steps=1")
    assert len(asked) == 2 and asked[0] == asked[1] and len(asked[0]) == 3
    assert "eval task   docvqa: anls on 3 of 5 questions" in said
    # The loss is over all rows, or the first so many of them.
    assert [record["eval_samples"] for record in records(done) if "eval_samples" in record] == [5]
    done, _ = run(recipe(tmp_path / "limited", {"limit": 2}), "train.max_steps=1")
    assert [record["eval_samples"] for record in records(done) if "eval_samples" in record] == [2]
    assert len(asked[-1]) == 2


@pytest.mark.parametrize(
    ("check_images", "said"),
    [
        ("auto", r"1 have images that cannot be decoded.*questions.jsonl, row 4, images\[0\]"),
        ("headers", r"1 of the sampled questions.*questions.jsonl, row 4.*half.png"),
    ],
)
def test_a_damaged_image_is_named(tmp_path, check_images, said):
    file = recipe(tmp_path)
    broken = tmp_path / "half.png"
    broken.write_bytes(IMAGES[0].read_bytes()[:400])
    rows = records(tmp_path, "questions.jsonl")
    rows[3]["image"] = str(broken)
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=f"(?s){said}"):
        run(file, "data.images_root=/", f"data.check_images={check_images}")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["evaluate.task=docvqqa"], "docvqa"),
        (["evaluate.task=custom"], "set metric"),
        (["evaluate.metric=anls"], "does not take one"),
        (["evaluate.sample=0"], "evaluate.sample"),
    ],
)
def test_what_does_not_go_together_is_told_by_the_recipe(tmp_path, overrides, told):
    with pytest.raises(ValueError, match=told):
        load_recipe(recipe(tmp_path), overrides)


@pytest.mark.parametrize(
    ("values", "greater", "since"),
    [
        ([], True, 0),
        ([0.1, 0.3, 0.2, 0.3], True, 2),
        ([3.0, 2.0, 2.5], False, 1),
        ([float("nan"), float("nan")], False, 2),
        ([float("nan"), 2.0], False, 0),
    ],
)
def test_evaluations_since_the_best(values, greater, since):
    assert evaluations_since_best(values, greater_is_better=greater) == since


def test_two_processes_have_the_score_of_one(tmp_path):
    """Questions are shared out; both get all replies, log one score, and keep the same checkpoint as best."""
    settings = {"adapter__dropout": 0.0, "data__shuffle": False, "train__max_steps": 2, "train__eval_steps": 2}
    settings |= {"train__save_steps": 2}
    one, _ = run(recipe(tmp_path / "one", {"patience": 3}, **settings))
    two = recipe(tmp_path / "two", {"patience": 3}, **settings, train__gradient_accumulation_steps=2)
    done = finetune_on(2, two)
    assert [process.returncode for process in done] == [0, 0], done
    folders = one, tmp_path / "two" / "run"
    scores = [[record["eval_anls"] for record in records(folder) if "eval_anls" in record] for folder in folders]
    assert scores[0] == scores[1] and len(scores[0]) == 2
    pairs = [[record["prediction"] for record in records(folder, "predictions.jsonl")] for folder in folders]
    assert pairs[0] == pairs[1] and len(pairs[0]) == 4
    assert json.loads((folders[1] / "run.json").read_text())["best_checkpoint"].endswith("step-2")
    # Once at the beginning, once at the end, and by one process.
    assert [process.stdout.count("on 5 questions") for process in done] == [2, 0]


def test_the_line_of_the_score_tells_replies_that_could_not_be_read():
    score = {
        "metric": "grounding",
        "questions": 200,
        "before": 0.0,
        "after": 0.5,
        "unread": {"before": 180, "after": 2},
    }
    line = "0.0000 -> 0.5000 on 200 questions; 180 -> 2 replies could not be read"
    assert score_line(score) == ("grounding", line)
    assert score_line({**score, "unread": {"before": 0, "after": 0}})[1] == "0.0000 -> 0.5000 on 200 questions"
    assert score_line({"metric": "anls", "questions": 3, "before": 0.5})[1] == "0.5000 on 3 questions"  # an older run
