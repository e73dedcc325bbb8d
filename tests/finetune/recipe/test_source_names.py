"""What a source of evaluation data is called."""

from dataclasses import dataclass

import pytest

from finetune.recipe import RecipeError, parse_recipe
from finetune.recipe.sources import NAME, name_given_twice, source_name, source_names

RECIPE = """
model: {{path: m}}
data: {{train: {{path: a, format: vqa}}}}
evaluate:
  task: {task}
  data:
    - {{path: a/eval.jsonl, format: vqa{first}}}
    - {{path: b/eval.jsonl, format: vqa{second}}}
output: o
"""


@dataclass
class Source:
    path: str
    name: str | None = None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("examples/nano/boarding.jsonl", "boarding"),
        ("HuggingFaceM4/DocumentVQA", "DocumentVQA"),
        ("data/eval.v2.jsonl", "eval.v2"),
        ("my forms (old).json", "my_forms_old_"),
        ("data/表单.parquet", "表单"),
        ("runs/prepared/eval/", "eval"),
        (".hidden.jsonl", "hidden"),
        ("..", "data"),
    ],
)
def test_the_file_gives_a_name_that_is_one_word(path, name):
    assert source_name(Source(path)) == name and NAME.fullmatch(name)


def test_a_name_given_goes_before_the_file():
    assert source_names([Source("a.jsonl", "new"), Source("b.jsonl")]) == ["new", "b"]
    assert name_given_twice(["a", "b", "a"]) == "a" and name_given_twice(["a", "b"]) is None


def recipe(task="docvqa", first="", second=""):
    return parse_recipe(RECIPE.format(task=task, first=first, second=second))


def test_names_differ_where_scores_are_told_apart_by_them():
    with pytest.raises(RecipeError, match=r"two sources are called eval.*give one of them another `name`"):
        recipe()
    with pytest.raises(RecipeError, match="two sources are called x"):
        recipe(first=", name: x", second=", name: x")
    assert source_names(recipe(first=", name: new").evaluate.data) == ["new", "eval"]
    # Without a task there is no score to tell apart.
    assert source_names(recipe(task="null").evaluate.data) == ["eval", "eval"]


@pytest.mark.parametrize("name", ["two words", "a/b", "..", "-x"])
def test_a_name_is_one_word(name):
    with pytest.raises(RecipeError, match=r"evaluate.data.0.name.*is not one word"):
        recipe(first=f", name: '{name}'")


def test_training_data_has_no_names():
    with pytest.raises(RecipeError, match=r"data.train.0.name: unknown key"):
        parse_recipe("model: {path: m}\ndata: {train: {path: a, format: vqa, name: x}}\noutput: o")
