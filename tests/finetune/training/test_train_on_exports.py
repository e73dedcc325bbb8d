"""Every layout of annotations is trained on and evaluated on: tiny checkpoint, two steps, no other preparation."""

import json

import pytest
from exports_for_tests import COCO, QUESTIONS, write_export
from recipes_for_tests import TINY, finetune, write_recipe
from said import collect

from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.evaluation.tasks import task_of
from finetune.recipe import load_recipe
from finetune.recipe.sources import LAYOUTS
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


def scored(folder, run, out, sources, metric) -> tuple[dict, list[dict], str]:
    """results.json, predictions.jsonl and what was said, of an evaluation of the run on a recipe's sources."""
    evaluated = {"data": sources, "task": "custom", "metric": metric, "max_new_tokens": 4}
    recipe = load_recipe(write_recipe(out, data__images_root=str(folder), evaluate=evaluated))
    said: list[str] = []
    task, data = task_of(recipe.evaluate), recipe.evaluate.data
    asked = Evaluation(str(run), task, data, images_root=str(folder), out=out / "scores", prompt="task")
    evaluate(asked, say=collect(said))
    lines = (out / "scores" / "predictions.jsonl").read_text().splitlines()
    results = json.loads((out / "scores" / "results.json").read_text())
    return results, [json.loads(line) for line in lines], "\n".join(said)


def test_the_boxes_of_every_layout_are_scored(trained, tmp_path):
    folder, run, _ = trained
    sources = [{**one, "name": one["annotations"]["layout"]} for one in sources_of(folder)[: len(LAYOUTS)]]
    results, records, said = scored(folder, run, tmp_path, sources, "detection")
    assert results["questions"] == len(records) == 2 * len(LAYOUTS)
    assert {record["source"] for record in records} == set(LAYOUTS)
    gold = [record["answers"] for record in records if record["source"] == "coco"]
    assert gold == [["<box>(100,100),(500,500)</box>"], ["<box>(500,0),(600,100)</box>"]]
    assert "1 images without an object" in said


def test_questions_are_scored(trained, tmp_path):
    folder, run, _ = trained
    source = sources_of(folder)[len(LAYOUTS)]
    _, records, said = scored(folder, run, tmp_path, source, "exact_match")
    assert [(record["question"], record["answers"]) for record in records] == [
        ("What is the total?", ["$ 12.40"]),
        ("Is it paid?", ["yes"]),
    ]
    assert "1 images without an answer" in said


def test_the_command_evaluates_a_layout(trained, tmp_path):
    folder, _, _ = trained
    out = tmp_path / "out"
    words = (
        f"--task custom --metric cider_d --format caption --max-new-tokens 4 --data {folder}/captions/i.json".split()
    )
    finetune("evaluate", TINY, *words, "--out", out, "--layout", "coco")
    assert json.loads((out / "results.json").read_text())["questions"] == 2
    wrong = finetune("evaluate", TINY, *words, "--layout", "yolo", check=False)
    assert wrong.returncode == 2 and "--layout yolo: the task reads format caption" in wrong.stderr


def test_check_says_what_was_left_out(trained):
    folder, _, _ = trained
    done = finetune("check", folder / "recipe.yaml", "--samples", "1")
    assert "left out: 1 images without an object" in " ".join(done.stdout.split())
