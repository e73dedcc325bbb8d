"""What pictures an evaluation shows of an image: those of training unless a command says otherwise, and it is said."""

import json
import shutil
from dataclasses import replace

import pytest
from questions_for_tests import ask as questions_of
from recipes_for_tests import IMAGES, ROOT, TINY, write_recipe

from finetune.cli import main
from finetune.errors import UserError
from finetune.evaluation import evaluate as evaluate_module
from finetune.evaluation import model_replies
from finetune.evaluation.asked_models import choose_views
from finetune.evaluation.evaluate import Evaluation, EvaluationSource, evaluate
from finetune.evaluation.evaluation import NO_VIEWS
from finetune.evaluation.tasks import find_task, published_task
from finetune.replies.replies import generate_replies
from finetune.terminal import labelled
from qwenvl.checkpoint.record import ModelRecord, write_record
from qwenvl.views import Views

DOCVQA = replace(find_task("docvqa"), max_new_tokens=2)
HALVES, FOUR = Views(True, (2, 1), 0.0), Views()
TRAINED, PLAIN, UNKNOWN = ModelRecord(labels="assistant", views=HALVES), ModelRecord(labels="assistant"), ModelRecord()


@pytest.mark.parametrize(
    ("record", "given", "views", "said"),
    [
        (TRAINED, {}, HALVES, "each image as the page and its 2 x 1 parts, overlap 0, as it was trained"),
        (PLAIN, {}, None, ""),
        (UNKNOWN, {}, None, ""),
        (TRAINED, {"views": FOUR}, FOUR, "overlap 0.1 (--views), though it was trained with the page and its 2 x 1"),
        (TRAINED, {"views": NO_VIEWS}, None, "each image as itself alone (--views), though it was trained with the"),
        (PLAIN, {"views": FOUR}, FOUR, "(--views), though it was trained with none"),
        (UNKNOWN, {"views": FOUR}, FOUR, "each image as the page and its 2 x 2 parts, overlap 0.1 (--views)"),
        (UNKNOWN, {"recipe_views": FOUR}, FOUR, "overlap 0.1, by data.views of the recipe"),
        (TRAINED, {"recipe_views": FOUR}, HALVES, "as it was trained, though the recipe has the page and its 2 x 2"),
        (PLAIN, {"recipe_views": FOUR}, None, "each image as itself alone, as it was trained, though the recipe has"),
        (UNKNOWN, {"like": HALVES}, HALVES, "overlap 0, as the model that it is compared with"),
        (PLAIN, {"like": HALVES}, None, ""),
        (TRAINED, {"task": published_task(DOCVQA)}, None, "as the published scripts do, though it was trained with"),
        (PLAIN, {"task": published_task(DOCVQA)}, None, ""),
    ],
)
def test_which_views_are_shown(record, given, views, said):
    changes = {key: value for key, value in given.items() if key != "like"}
    evaluation = replace(Evaluation("model", DOCVQA, (EvaluationSource("rows.jsonl"),)), **changes)
    found, told = choose_views(evaluation, record, like=given.get("like"))
    assert found == views and said in told and bool(said) == bool(told)


@pytest.fixture
def trained(tmp_path):
    folder = tmp_path / "trained"
    shutil.copytree(TINY, folder)
    write_record(folder, replace(TRAINED, chat_format="chatml"))
    return str(folder)


@pytest.fixture
def asked(monkeypatch):
    """The images of every call for replies."""
    calls = []

    def replies(model, prompts, *others, **options):
        calls.append([list(prompt.images) for prompt in prompts])
        return generate_replies(model, prompts, *others, **options)

    monkeypatch.setattr(model_replies, "generate_replies", replies)
    return calls


def test_a_model_and_its_base_are_shown_the_same(tmp_path, trained, asked):
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"image": str(IMAGES[0]), "question": "Total?", "answers": ["x"]}) + "\n"
    )

    def run(**changes):
        source, said = EvaluationSource(str(tmp_path / "rows.jsonl")), []
        given = {"images_root": str(ROOT), "out": tmp_path / "out", **changes}
        out = evaluate(Evaluation(trained, DOCVQA, (source,), **given), say=lambda *line: said.append(labelled(*line)))
        return json.loads((out / "results.json").read_text()), said

    results, said = run(compare=str(TINY))
    assert asked == [[HALVES.pictures(str(IMAGES[0]))]] * 2
    assert [line.split("overlap 0, ")[1] for line in said if line.startswith("views")] == [
        "as it was trained",
        "as the model that it is compared with",
    ]
    assert results["settings"]["views"] == HALVES.to_json()
    with pytest.raises(UserError, match=r"settings\.views\.grid: \[2, 1\] -> \(absent\)"):
        run(views=NO_VIEWS)
    run(views=NO_VIEWS, out=tmp_path / "alone")
    assert asked[2:] == [[[str(IMAGES[0])]]]


def test_the_command_passes_on_what_it_is_told(tmp_path, monkeypatch, capfd):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "question": "Q", "answers": ["A"]}) + "\n")
    source = {"path": str(tmp_path / "rows.jsonl"), "format": "vqa"}
    views = {"grid": [1, 2], "overlap": 0.0}
    recipe = write_recipe(tmp_path, evaluate={"data": source, "task": "docvqa"}, data__views=views)
    given: list[Evaluation] = []
    monkeypatch.setattr(evaluate_module, "evaluate", given.append)
    command = ["evaluate", str(TINY), "--recipe", str(recipe)]
    for option in ([], ["--views", "3x1:0.2"], ["--views", "2x2"], ["--views", "none"]):
        assert main([*command, *option]) == 0
    assert [one.views for one in given] == [None, Views(True, (3, 1), 0.2), FOUR, NO_VIEWS]
    assert all(one.recipe_views == Views(True, (1, 2), 0.0) for one in given)
    capfd.readouterr()
    refused = {"2": "rows x columns", "2x2:9": "must be none, or", "9x1": "from 1 to 8", "1x1": "1 x 1 is"}
    for wrong, told in refused.items():
        assert main([*command, "--views", wrong]) == 2
        assert told in capfd.readouterr().err
    assert main([*command, "--views", "2x2", "--prompt", "published"]) == 2
    assert "leave out --views" in capfd.readouterr().err


def test_questions_and_solved_examples_have_the_pictures(tmp_path, tiny_processor):
    rows = [{"image": f"{name}.png", "question": f"Q {name}", "answers": ["A"]} for name in "ab"]
    questions = questions_of(tmp_path, "docvqa", *rows, style="base", shots=1, views=HALVES)
    rendered = questions[0].render(tiny_processor.tokenizer, 4)
    a, b = (HALVES.pictures(str(tmp_path / f"{name}.png")) for name in "ab")
    assert rendered.images == [*b, *a] and questions[0].pictures == a and list(questions[0].images) == a[:1]
    assert questions.fingerprint() != questions_of(tmp_path, "docvqa", *rows, style="base", shots=1).fingerprint()
    row = {"image": "a.png", "answer": ["dog"], "bbox": [20, 10, 40, 30]}
    [found] = questions_of(tmp_path, "refcoco", row, views=HALVES)
    assert found.image_size == (200, 100) and len(found.pictures) == 3
    with pytest.raises(UserError, match="asks for boxes, which are of the whole page"):
        questions_of(tmp_path, "refcoco", row, views=replace(HALVES, page=False))
    both = {**rows[0], "image": ["a.png", "b.png"], "question": "Is Picture 2 a form?"}
    with pytest.raises(UserError, match=r"says .Picture 2., and image 2 is another picture with data\.views"):
        questions_of(tmp_path, "docvqa", both, views=HALVES)
