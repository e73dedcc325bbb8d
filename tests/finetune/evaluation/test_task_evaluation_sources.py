"""Evaluation data of several sources: what is learned on one and forgotten on another is told apart, everywhere."""

import json
import re
from pathlib import Path

import pytest
from recipes_for_tests import IMAGES, ROOT, TINY, write_recipe
from said import collect

from finetune.errors import UserError
from finetune.evaluation.evaluate import Evaluation, EvaluationSource, evaluate
from finetune.evaluation.tasks import custom_task
from finetune.recipe import load_recipe
from finetune.terminal import labelled, say_nothing
from finetune.training.train import train

NEW = 4


def silent(line: str):
    pass


def write_questions(file: Path, count: int, *, images: int, answers: list[str] | None = None, **more) -> Path:
    """Questions in turn about the first so many images."""
    rows = [
        {"image": str(IMAGES[n % images]), "question": f"Number {n} of {file.stem}?", "answers": ["Answer"], **more}
        for n in range(count)
    ]
    if answers is not None:
        rows = [{**row, "answers": [answer]} for row, answer in zip(rows, answers, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def replies_to(file: Path, model: Path, out: Path) -> list[str]:
    """What a model replies to the questions of a file."""
    task = custom_task("anls", max_new_tokens=NEW)
    folder = evaluate(
        Evaluation(str(model), task, (EvaluationSource(str(file)),), images_root="/", out=out, style="chat"),
        say=say_nothing,
    )
    return [json.loads(line)["prediction"] for line in (folder / "predictions.jsonl").open()]


def recipe(folder: Path, sources: list[dict], **evaluation) -> Path:
    section = {"data": sources, "task": "custom", "metric": "anls", "max_new_tokens": NEW, "predictions": 4}
    changes = {"train__max_steps": 2, "train__eval_strategy": "steps", "train__eval_steps": 1}
    return write_recipe(folder, evaluate={**section, **evaluation}, data__images_root="/", **changes)


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run folder, lines said, folder with recipe and data). The base knows the answers of `old`, as they are its own
    replies, and none of `boarding`."""
    folder = tmp_path_factory.mktemp("sources")
    old = write_questions(folder / "old.jsonl", 9, images=2)
    write_questions(old, 9, images=2, answers=replies_to(old, TINY, folder / "asked"))
    new = write_questions(folder / "new.jsonl", 5, images=5)
    sources = [{"path": str(new), "format": "vqa", "name": "boarding"}, {"path": str(old), "format": "vqa"}]
    said: list[str] = []
    done = train(load_recipe(recipe(folder, sources, sample=10)), say=collect(said))
    return done, said, folder


def test_scores_are_logged_by_source(run):
    done, said, _ = run
    logged = [record for record in records(done) if "eval_anls" in record]
    assert [record["step"] for record in logged] == [0, 1, 2]
    assert (logged[0]["eval_anls_boarding"], logged[0]["eval_anls_old"]) == (0.0, 1.0)
    for record in logged:
        parts = record["eval_anls_boarding"], record["eval_anls_old"]
        assert record["eval_anls"] == pytest.approx(sum(parts) / 2)
    # What this much training does to replies that were all right: the scores of the sources do not move together.
    assert logged[-1]["eval_anls_old"] < 1
    assert "eval task   custom: anls on 10 of 14 questions (boarding 5, old 5)" in said


def test_the_run_says_them_before_and_after(run):
    done, said, _ = run
    score = json.loads((done / "run.json").read_text())["score"]
    assert score["questions"] == 10 and list(score["sources"]) == ["boarding", "old"]
    new, old = score["sources"].values()
    assert (new["questions"], old["questions"]) == (5, 5)
    assert (new["before"], old["before"]) == (0.0, 1.0) and score["before"] == 0.5
    assert score["after"] == pytest.approx((new["after"] + old["after"]) / 2)
    (line,) = [line for line in said if line.startswith("anls ")]
    assert line == (
        f"anls        {score['before']:.4f} -> {score['after']:.4f} on 10 questions "
        f"(boarding 0.0000 -> {new['after']:.4f} on 5, old 1.0000 -> {old['after']:.4f} on 5)"
    )
    assert not any("eval anls" in line for line in said)  # one line for the score, not two


def test_the_report_has_a_table_and_one_chart_of_them(run):
    done, _, _ = run
    html = (done / "report.html").read_text()
    cells = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in re.findall("<tr>.*?</tr>", html)]
    old = json.loads((done / "run.json").read_text())["score"]["sources"]["old"]["after"]
    assert 0 < old < 1  # of the better of the two checkpoints
    assert ["", "questions", "before training", "after training", "change"] in cells
    assert ["source boarding", "5", "0.0000", "0.0000", "+0.0000"] in cells
    assert ["source old", "5", "1.0000", f"{old:.4f}", f"{old - 1:+.4f}"] in cells
    charts = re.findall(r'aria-label="(Evaluation: anls[^"]*)"', html)
    assert charts == ["Evaluation: anls, score: from 0 to 1 over steps 0 to 2"]
    (chart,) = re.findall(r"<figure[^>]*><figcaption><strong>Evaluation: anls<.*?</figure>", html)
    assert re.findall(r"</svg>([^<]+)</span>", chart) == ["all questions", "boarding", "old"]


def test_the_replies_shown_are_of_different_documents_and_of_both_sources(run):
    done, _, _ = run
    shown = records(done, "predictions.jsonl")
    asked = [[record["question"] for record in shown if record["when"] == when] for when in ("before", "after")]
    assert asked[0] == asked[1] and len(set(asked[0])) == 4
    before = shown[:4]
    # `old` is about two images: its second one is that of the first row of `boarding`.
    assert [record["source"] for record in before] == ["boarding", "old", "boarding", "boarding"]
    assert len({tuple(record["images"]) for record in before}) == 4
    assert all((done / image).is_file() for record in before for image in record["images"])
    assert {record["metric"] for record in shown} == {"anls"}
    panels = re.findall(r"<article.*?</article>", (done / "report.html").read_text(), re.DOTALL)
    assert len(panels) == 4 and all(panel.count("<img ") == 1 for panel in panels)
    assert "✗ wrong" in panels[0] and "✓ right" in panels[1].split("</section>")[0]


def test_evaluate_scores_them_by_the_same_names(run, tmp_path):
    done, _, folder = run
    sources = load_recipe(folder / "recipe.yaml").evaluate.data
    said: list[str] = []
    task = custom_task("anls", max_new_tokens=NEW)
    asked = Evaluation(
        str(done), task, sources, compare=str(TINY), images_root="/", out=tmp_path / "out", style="chat"
    )
    out = evaluate(asked, say=lambda label, text="": said.append(labelled(label, text)))
    results = json.loads((out / "results.json").read_text())
    assert {name: source["questions"] for name, source in results["sources"].items()} == {"boarding": 5, "old": 9}
    assert results["compared"]["sources"]["old"]["score"] == 1.0 > results["sources"]["old"]["score"]
    low, high = results["sources"]["old"]["interval"]
    assert low <= results["sources"]["old"]["score"] <= high
    assert "task        custom: anls on 14 questions (boarding 5, old 9)" in said
    assert any(line.startswith("  old ") and line.endswith("9 questions; compared: 1.0000") for line in said)
    assert [record["source"] for record in records(out, "predictions.jsonl")] == ["boarding"] * 5 + ["old"] * 9
    page = (out / "evaluation.html").read_text()
    assert "<h2>Sources</h2>" in page and "<span>old</span>" in page


def test_another_source_may_pick_the_best_checkpoint(tmp_path):
    new = write_questions(tmp_path / "new.jsonl", 3, images=3)
    old = write_questions(tmp_path / "old.jsonl", 3, images=3)
    file = recipe(tmp_path, [{"path": str(path), "format": "vqa"} for path in (new, old)])
    said: list[str] = []
    done = train(load_recipe(file, ["train.metric_for_best_model=eval_anls_old"]), say=collect(said))
    description = json.loads((done / "run.json").read_text())
    # All scores are 0, and of equal ones that with the lower loss counts, then the later one.
    assert description["best_checkpoint"].endswith("step-2") and description["steps"] == 2
    told = f"adapter     {done / 'adapter'}, of step 2: the best eval_anls_old, tied with step 1: the lower eval_loss"
    assert told in said


def test_a_source_called_like_a_group_is_refused_before_training(tmp_path):
    files = [
        write_questions(tmp_path / f"{name}.jsonl", 2, images=2, human_or_machine=0) for name in ("human", "machine")
    ]
    columns = {"question": "question", "answers": "answers"}
    sources = [{"path": str(file), "format": "vqa", "columns": columns} for file in files]
    file = recipe(tmp_path, sources, task="chartqa", metric=None)
    with pytest.raises(UserError, match="human is the name of a source and of a group: rename the source"):
        train(load_recipe(file), say=say_nothing)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_a_task_the_rows_shown_are_of_different_documents_too(tmp_path):
    """Conversations of two files: three about one image, then others."""
    for name, images in (("a", (0, 0, 0, 1)), ("b", (2, 3))):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"What is {n} in {name}?"},
                    {"role": "assistant", "content": "It."},
                ],
                "images": [str(IMAGES[image])],
            }
            for n, image in enumerate(images)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(tmp_path / f"{name}.jsonl"), "format": "messages"} for name in "ab"]
    section = {"data": sources, "predictions": 5, "max_new_tokens": 2}
    file = write_recipe(tmp_path, evaluate=section, train__max_steps=1, data__images_root=str(ROOT))
    done = train(load_recipe(file), say=say_nothing)
    asked = [record["question"] for record in records(done, "predictions.jsonl") if record["when"] == "before"]
    # Four documents, the sources in turn; then the first of the others.
    assert asked == ["What is 0 in a?", "What is 0 in b?", "What is 3 in a?", "What is 1 in b?", "What is 1 in a?"]
