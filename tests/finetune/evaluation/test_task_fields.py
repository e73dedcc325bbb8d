"""The task `fields`: its questions, its scores over all documents, and a run that trains and evaluates on PDFs."""

import json

import pytest
from files_of_pages import pdf
from questions_for_tests import ask
from recipes_for_tests import finetune, write_recipe

from finetune.cli import main
from finetune.commands import evaluate as command
from finetune.errors import UserError
from finetune.evaluation.field_scores import f1_difference, fields_record, fields_summary, micro_f1
from finetune.evaluation.tasks import custom_task, find_task, published_task
from finetune.metrics.document_fields import FieldsAsked

JSON = {"reply": "json", "fields": ["no", "total"]}
ROW = {"image": "a.png", "no": "A-17", "total": "12.40"}


def test_a_document_is_one_question_for_json_or_one_for_each_field(tmp_path):
    [question] = ask(tmp_path, "fields", ROW, source_with=JSON)
    assert question.answers == ('{"no": "A-17", "total": "12.40"}',) and question.fields.is_json
    assert question.messages[0]["content"][1]["text"].endswith("reply in JSON: no, total")
    given = {"fields": ["no", "total"], "prompts": ["{field}?", "Read {field}"]}
    each = ask(tmp_path, "fields", {**ROW, "no": ""}, ROW, source_with=given)
    assert [(one.text, one.answers, one.id) for one in each] == [
        ("total?", ("12.40",), "row 1"),
        ("no?", ("A-17",), "row 2.1"),
        ("total?", ("12.40",), "row 2.2"),
    ]
    [raw] = ask(tmp_path, "fields", ROW, source_with=JSON, style="base")
    assert raw.messages[0]["content"][1]["text"].endswith("no, total Answer:")
    assert each.fingerprint() != ask(tmp_path, "fields", ROW, ROW, source_with=given | {"prompts": "{field}?"})


def test_what_a_reply_is_worth(tmp_path):
    questions = ask(tmp_path, "fields", ROW, ROW, source_with=JSON)
    task = questions.task
    replies = ['{"no": "A-17", "total": "12"}', "A-17"]
    assert task.score_all(questions, replies).values == [0.5, 0.0]
    assert [task.unread(question, reply) for question, reply in zip(questions, replies, strict=True)] == [
        None,
        "hold no JSON object",
    ]


def record(reply, **gold):
    return {"fields": fields_record(reply, FieldsAsked(tuple(gold), tuple(gold.values()), is_json=True))}


def test_the_score_is_f1_over_all_values_together():
    # 2 of 2 right, 0 of 1 with one given, and nothing read of 3: right 2, given 3, gold 6.
    three = {"a": "1", "b": "2", "c": "3"}
    records = [record('{"a": "1", "b": "2"}', a="1", b="2"), record('{"a": "9"}', a="1"), record("none", **three)]
    score, interval = micro_f1(records)
    assert score == pytest.approx(4 / 9) and interval.low <= score <= interval.high
    found = fields_summary(records)
    assert found["precision"] == pytest.approx(2 / 3) and found["recall"] == pytest.approx(2 / 6)
    assert found["by_field"] == {
        "a": {"exact": pytest.approx(1 / 3), "anls": pytest.approx(1 / 3), "documents": 3},
        "b": {"exact": 0.5, "anls": 0.5, "documents": 2},
        "c": {"exact": 0.0, "anls": 0.0, "documents": 1},
    }
    # The trees: 1; a text of one character changed of 1 + 1; broken.
    assert found["json"] == {"tree_accuracy": pytest.approx(1.5 / 3), "replies": 3, "broken": 1, "too_large": 0}
    assert f1_difference(records, records) == (0, 0)
    low, high = f1_difference([records[0]] * 3, [record("{}", a="1", b="2")] * 3)
    assert (low, high) == (1, 1)


def test_fields_are_asked_by_their_source_alone(tmp_path):
    with pytest.raises(UserError, match="needs data of format fields, not vqa"):
        custom_task("field_f1", format="vqa")
    assert custom_task("field_f1", format="fields").max_new_tokens == 512
    with pytest.raises(UserError, match="published scripts have nothing like task fields"):
        published_task(find_task("fields"))
    with pytest.raises(UserError, match=r"none of the 1 rows can be asked|total: is missing"):
        ask(tmp_path, "fields", {"image": "a.png", "no": "1"}, source_with=JSON)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on invoices as PDFs of two pages, with a spreadsheet of their fields."""
    folder = tmp_path_factory.mktemp("fields")
    lines = ["file;no;total"]
    for number in range(2):
        (folder / f"{number}.pdf").write_bytes(pdf([(0, 60 * number, 0), (0, 0, 60 * number)]))
        lines.append(f"{number}.pdf;A-{number};{number}.40")
    (folder / "rows.csv").write_text("\n".join(line.replace(";", ",") for line in lines) + "\n")
    source = {"path": str(folder / "rows.csv"), "format": "fields", "columns": {"image": "file"}, **JSON}
    file = write_recipe(
        folder,
        data__train=[source],
        data__images_root=str(folder),
        data__pages={"dpi": 72, "first": 2},
        evaluate={"data": [source], "task": "fields", "predictions": 2, "max_new_tokens": 40},
        train__max_steps=2,
        train__eval_strategy="steps",
        train__eval_steps=2,
        output=str(folder / "run"),
    )
    finetune(str(file))
    return folder, file


def test_a_run_trains_and_evaluates_on_documents(trained):
    folder, _ = trained
    run = json.loads((folder / "run" / "run.json").read_text())
    assert run["score"]["metric"] == "field_f1" and run["score"]["questions"] == 2
    logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval_field_f1"] for line in logged if "eval_field_f1" in line]


def test_a_limit_that_cuts_the_right_json_is_refused(trained, capsys):
    assert main(["check", str(trained[1]), "evaluate.max_new_tokens=12"]) == 2
    assert "max_new_tokens: the right replies to 2 of 2 questions have more than 12 tokens" in capsys.readouterr().err


def test_rows_that_the_recipe_leaves_out_are_left_out_in_its_evaluation(trained, tmp_path, capsys):
    folder, _ = trained
    rows = folder / "bad.csv"
    rows.write_text((folder / "rows.csv").read_text() + "none.pdf,A-9,9.40\n")
    source = {"path": str(rows), "format": "fields", "columns": {"image": "file"}, **JSON}
    file = write_recipe(
        tmp_path,
        data__train=[source],
        data__images_root=str(folder),
        data__pages={"dpi": 72, "first": 2},
        data__on_bad_row="skip",
        evaluate={"data": [source], "task": "fields", "max_new_tokens": 40},
    )
    finetune("evaluate", str(folder / "run"), "--recipe", str(file), "--out", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "results.json").read_text())["questions"] == 2
    capsys.readouterr()
    asked = ["evaluate", str(folder / "run"), "--recipe", str(file), "--out", str(tmp_path / "other")]
    assert main([*asked, "--on-bad-row", "error"]) == 2
    assert "leave them out with --on-bad-row skip" in capsys.readouterr().err


def test_the_run_is_evaluated_by_its_recipe_and_from_the_command_line(trained, tmp_path):
    folder, file = trained
    finetune("evaluate", str(folder / "run"), "--recipe", str(file), "--out", str(tmp_path / "one"))
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert results["metric"] == "field_f1" and results["questions"] == 2
    assert results["fields"]["by_field"].keys() == {"no", "total"} and results["fields"]["json"]["replies"] == 2
    page = (tmp_path / "one" / "evaluation.html").read_text()
    assert "<h2>Fields</h2>" in page and "tree edit" in page.lower()
    data = ["--task", "fields", "--data", str(folder / "rows.csv"), "--fields", "no,total", "--column", "image=file"]
    pages = ["--pages", "2", "--dpi", "72", "--max-new-tokens", "40", "--reply", "json"]
    finetune("evaluate", str(folder / "run"), *data, *pages, "--out", str(tmp_path / "two"))
    other = json.loads((tmp_path / "two" / "results.json").read_text())
    assert other["fields"] == results["fields"] and other["score"] == results["score"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--task", "fields", "--data", "x.csv"], "--task fields needs --fields"),
        (["--task", "docvqa", "--data", "x.csv", "--fields", "a"], "--fields is for --task fields"),
        (["--task", "docvqa", "--data", "x.csv", "--reply", "json"], "--reply is for --task fields"),
        (["--recipe", "r.yaml", "--pages", "2"], "--recipe says what is asked, and so does --pages"),
    ],
)
def test_arguments_that_do_not_go_together(given, reason):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(UserError, match=reason):
        command.refuse_what_does_not_go_together(parser.parse_args(["model", *given]))
