"""What a row of evaluation data holds and its format does not read: refused or told, as of training data."""

import argparse
import json

import pytest
from questions_for_tests import CONVERSATION, ROWS, ask, write
from recipes_for_tests import TINY, write_recipe

from finetune.commands import evaluate as command
from finetune.data.reading import read_checked
from finetune.data.sample import DataError
from finetune.data.summary import describe_data
from finetune.errors import UserError
from finetune.evaluation.task_evaluation import TaskEvaluation
from finetune.evaluation.tasks import custom_task
from finetune.recipe import load_recipe

ANLS = custom_task("anls", format="messages")
TURNS = CONVERSATION["messages"]


@pytest.mark.parametrize(
    ("task", "row", "column"),
    [
        ("docvqa", {**ROWS["docvqa"], "images": ["b.png"]}, "images"),
        ("docvqa", {**ROWS["docvqa"], "system": "Be brief."}, "system"),
        ("refcoco", {**ROWS["refcoco"], "objects": {"bbox": [[1, 2, 3, 4]]}}, "objects"),
        ("flickr30k", {**ROWS["flickr30k"], "history": [["a", "b"]]}, "history"),
        (ANLS, {**CONVERSATION, "image": "b.png"}, "image"),
        (ANLS, {"messages": [{**TURNS[0], "tool_calls": [1]}, *TURNS[1:]]}, "messages[0].tool_calls"),
        (custom_task("anls", format="qwen_json"), {"conversations": [], "image": "a.png"}, "image"),
    ],
)
def test_columns_that_would_change_the_question_are_refused(tmp_path, task, row, column):
    with pytest.raises(DataError) as caught:
        ask(tmp_path, task, row)
    assert f"row 1, {column}: format" in str(caught.value) and "data.ignore: [" in str(caught.value)


def test_what_may_be_left_unread_is_counted(tmp_path):
    some = {"notes": "x", "system": "s"}, {"notes": "", "ocr": [1]}, {}
    questions = ask(tmp_path, "docvqa", *({**ROWS["docvqa"], **more} for more in some), ignore=["system"])
    assert questions.notes == ["not read: notes (1 row), ocr (1 row)"] and len(questions) == 3
    looks = {**ROWS["docvqa"], "question": "What is <image> here?"}
    with pytest.raises(DataError, match="<image> looks like markup"):
        ask(tmp_path, "docvqa", looks)
    questions = ask(tmp_path, "docvqa", looks, ROWS["docvqa"], markup_as_text=["<image>"])
    assert questions.notes == ["markup asked as text: <image> (1 row)"]


def test_turns_that_are_context_are_asked_after_and_are_no_answers(tmp_path):
    """A reply that is not to be learned may stand before the question, and cannot be what is right."""
    context = [TURNS[0], {**TURNS[1], "train": False}, *TURNS[2:]]
    marked = [*TURNS[:3], {**TURNS[3], "loss": 0}]
    plain, asked = (ask(tmp_path, ANLS, {**CONVERSATION, "messages": one})[0] for one in (TURNS, context))
    assert asked.answers == plain.answers == ("12.40",)
    assert [part["content"] for part in asked.messages] == [part["content"] for part in plain.messages]
    with pytest.raises(DataError, match="gold answer, is marked as not to be learned"):
        ask(tmp_path, ANLS, {**CONVERSATION, "messages": marked})
    both = {**CONVERSATION, "messages": marked}, CONVERSATION
    assert len(ask(tmp_path, ANLS, *both, on_bad_row="skip")) == 1


def evaluate(folder, *words):
    """`finetune evaluate` in this process."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = TINY, *words, "--max-new-tokens", 1, "--limit", 1, "--out", folder / "out"
    command.run(parser.parse_args([str(word) for word in given]))


def test_the_command_refuses_them_and_takes_the_words_that_let_them_be(tmp_path, capsys):
    row = {**ROWS["docvqa"], "question": "Where is <image>?", "system": "Be brief.", "notes": "x"}
    words = "--task", "docvqa", "--data", write(tmp_path, [row, ROWS["docvqa"]])
    with pytest.raises(DataError, match="row 1, system: format vqa does not read it"):
        evaluate(tmp_path, *words)
    with pytest.raises(DataError, match="<image> looks like markup"):
        evaluate(tmp_path, *words, "--ignore", "system")
    with pytest.raises(UserError, match="<imgage>"):
        evaluate(tmp_path, *words, "--ignore", "system", "--markup-as-text", "<imgage>")
    evaluate(tmp_path, *words, "--ignore", "system", "--markup-as-text", "<image>")
    said = capsys.readouterr().out
    assert "data.jsonl: markup asked as text: <image> (1 row)" in said
    assert "data.jsonl: not read: notes (1 row)" in said


def test_a_recipe_says_it_for_its_evaluation_too(tmp_path, tiny_processor):
    file = write_recipe(tmp_path, evaluate=None)
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
    row = {**CONVERSATION, "image": "b.png", "notes": "x"}
    source = {"path": str(write(tmp_path, [row], "eval.jsonl")), "format": "messages"}
    section = {"data": source, "task": "custom", "metric": "anls"}
    overrides = f"evaluate={json.dumps(section)}", "data.images_root=null"
    for read in (read_checked, lambda recipe, processor, **_: TaskEvaluation(recipe, processor)):
        with pytest.raises(DataError, match="row 1, image: format messages does not read it"):
            read(load_recipe(file, overrides), tiny_processor, show_progress=False)
    recipe = load_recipe(file, [*overrides, "data.ignore=[image]"])
    _, checked = read_checked(recipe, tiny_processor, show_progress=False)["eval"]
    assert describe_data(checked).endswith("not read: notes (1 row)")
    assert len(TaskEvaluation(recipe, tiny_processor).questions) == 1
