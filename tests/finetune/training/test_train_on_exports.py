"""Every layout of annotations is trained on and evaluated on: tiny checkpoint, two steps, no other preparation."""

import json

import pytest
from exports_for_tests import COCO, QUESTIONS, write_export
from recipes_for_tests import TINY, finetune, write_recipe
from said import collect

from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.evaluation.tasks import task_of
from finetune.recipe import load_recipe
from finetune.recipe.sections import LAYOUTS
from finetune.training.train import train

BRIEF = {"max_steps": 2, "logging_steps": 1, "save_steps": 2, "eval_strategy": "epoch", "learning_rate": 1e-3}


def sources_of(folder) -> list[dict]:
    """A source of each layout, in both forms of rows; of Label Studio questions too, and captions of COCO."""
    sources = []
    for number, layout in enumerate(LAYOUTS):
        path = str(write_export(folder / layout, layout))
        one = {"path": path, "format": "grounding", "annotations": {"layout": layout}}
        if number % 2:
            one["annotations"] |= {"rows": "image", "unlabelled": "keep"}
            one["prompt"] = "Find all objects."
        sources.append(one)
    answers = {"layout": "label_studio", "questions": QUESTIONS, "classes": {"Y": "yes"}}
    sources.append({"path": sources[1]["path"], "format": "vqa", "annotations": answers})
    captions = {**COCO, "annotations": [{"image_id": 1, "caption": "A car."}, {"image_id": 2, "caption": "Road."}]}
    path = str(write_export(folder / "captions", "coco", captions))
    sources.append({"path": path, "format": "caption", "annotations": {"layout": "coco"}})
    return sources


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run that was trained on all of them and evaluated on them after each epoch, and what it said."""
    folder = tmp_path_factory.mktemp("exports")
    sources = sources_of(folder)
    said: list[str] = []
    recipe = write_recipe(
        folder,
        data__train=sources,
        data__images_root=str(folder),
        train=BRIEF | {"per_device_train_batch_size": 8, "gradient_checkpointing": False},
        evaluate={"data": [{**one, "name": f"s{n}"} for n, one in enumerate(sources)], "predictions": 0},
    )
    return folder, train(load_recipe(recipe), say=collect(said)), said


def test_all_of_it_is_trained_and_evaluated(trained):
    _, run, said = trained
    # Two rows of each layout: two classes of one image, or an image with objects and one without. Two answers, two
    # captions.
    rows = 2 * len(LAYOUTS) + 2 + 2
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(record.get("eval_loss", 0) > 0 for record in losses)
    told = "\n".join(said)
    assert told.count(f"{rows} of {rows} rows") == 2
    assert "1 images without an object" in told


def test_questions_and_captions_are_scored(trained, tmp_path):
    folder, run, _ = trained
    answers = {"layout": "label_studio", "questions": QUESTIONS, "classes": {"Y": "yes"}}
    source = {"path": str(folder / "label_studio" / "t.json"), "format": "vqa", "annotations": answers}
    recipe = load_recipe(
        write_recipe(
            tmp_path,
            data__images_root=str(folder),
            evaluate={"data": source, "task": "custom", "metric": "exact_match", "max_new_tokens": 4},
        )
    )
    said: list[str] = []
    out = evaluate(
        Evaluation(
            model=str(run), task=task_of(recipe.evaluate), sources=recipe.evaluate.data, images_root=str(folder),
            out=tmp_path / "out",
        ),
        say=collect(said),
    )  # fmt: skip
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [(record["question"], record["answers"]) for record in records] == [
        ("What is the total?", ["$ 12.40"]),
        ("Is it paid?", ["yes"]),
    ]
    assert "1 images without an answer" in "\n".join(said)


def test_the_command_evaluates_a_layout(trained, tmp_path):
    folder, _, _ = trained
    path = folder / "captions" / "i.json"
    words = (
        "--task",
        "custom",
        "--metric",
        "cider_d",
        "--format",
        "caption",
        "--data",
        path,
        "--out",
        tmp_path / "out",
    )
    done = finetune("evaluate", TINY, *words, "--layout", "coco", "--max-new-tokens", "4")
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["questions"] == 2, done.stdout
    wrong = finetune("evaluate", TINY, *words, "--layout", "yolo", check=False)
    assert wrong.returncode == 2 and "--layout yolo: the task reads format caption" in wrong.stderr


def test_check_says_what_was_left_out(trained):
    folder, _, _ = trained
    done = finetune("check", folder / "recipe.yaml", "--samples", "1")
    assert "left out: 1 images without an object" in " ".join(done.stdout.split())
