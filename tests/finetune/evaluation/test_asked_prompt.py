"""By which prompt a model is asked: that of its training, unless something else is said; and it is always said."""

import json
from dataclasses import replace

import pytest
from recipes_for_tests import write_recipe

from finetune.errors import UserError
from finetune.evaluation.asked_prompt import (
    AskedPrompt,
    TrainedPrompts,
    asked_otherwise,
    choose_prompt,
    trained_prompts,
)
from finetune.evaluation.tasks import custom_task, find_task, published_task
from finetune.recipe import load_recipe

DOCVQA = find_task("docvqa")
NOTHING = TrainedPrompts({}, {}, None)
ANSWER = TrainedPrompts({"vqa": ["{question} Answer:"]}, {}, "its record")


def chosen(task=DOCVQA, trained=NOTHING, style="chat", **given) -> AskedPrompt:
    return choose_prompt("runs/x", task, style, trained, **{"given": None, **given})


def test_the_prompt_of_training_comes_first_and_the_tasks_where_there_is_none():
    assert chosen(trained=ANSWER) == AskedPrompt(
        "trained", "{question} Answer:", "by the prompt it was trained with: '{question} Answer:'"
    )
    plain = chosen()
    assert (plain.kind, plain.text) == ("task", "{question}") and "nothing says with which prompt" in plain.said
    assert chosen(style="base").text == "{question} Answer:"
    assert chosen(trained=ANSWER, given="trained").kind == "trained"
    with pytest.raises(UserError, match="--prompt trained: runs/x: nothing says with which prompt it was trained"):
        chosen(given="trained")


@pytest.mark.parametrize(
    ("name", "trained", "said"),
    [
        ("refcoco", {"vqa": ["{question} Answer:"]}, "trained with '{question} Answer:', which cannot ask this task"),
        ("docvqa", {"grounding": ["<ref>{phrase}</ref>"]}, "which cannot ask this task"),
        ("docvqa", {"vqa": ["Find {phrase}: {question}"]}, "which cannot ask this task"),
        ("multiple_choice", {"vqa": ["{question}"]}, "which cannot ask this task"),
        ("flickr30k", {"caption": ["Say {question}"]}, "which cannot ask this task"),
        ("docvqa", {}, "trained on conversations"),
    ],
)
def test_a_prompt_that_cannot_ask_the_task_is_not_taken(name, trained, said):
    task = find_task(name)
    found = chosen(task, TrainedPrompts(trained, {}, "recipe.yaml"))
    assert (found.kind, found.text) == ("task", task.chat_prompt) and said in found.said


def test_prompts_of_several_kinds_of_task():
    trained = TrainedPrompts(
        {"vqa": ["{question}!"], "caption": ["Tell."], "grounding": ["Find <ref>{phrase}</ref>"]}, {}, "recipe.yaml"
    )
    for name, prompt in (("textvqa", "{question}!"), ("nocaps", "Tell."), ("refcoco", "Find <ref>{phrase}</ref>")):
        assert chosen(find_task(name), trained).text == prompt


def test_of_several_prompts_that_of_the_runs_own_evaluation_or_none():
    two = TrainedPrompts({"vqa": ["{question}", "{question} Answer:"]}, {}, "recipe.yaml")
    with pytest.raises(UserError, match=r"trained with 2 prompts that can ask task docvqa:\n  '{question}'\n  '"):
        chosen(trained=two)
    asked = replace(two, preferred={"vqa": ["{question} Answer:"]})
    assert chosen(trained=asked).text == "{question} Answer:"
    assert chosen(trained=replace(two, preferred={"vqa": ["Else {question}"]}), given="task").kind == "task"
    assert chosen(trained=two, given="{question}?").text == "{question}?"


def test_a_text_is_taken_as_it_is_and_must_hold_its_place():
    assert chosen(trained=ANSWER, given="Look: {question}").said == "by the prompt that was given: 'Look: {question}'"
    with pytest.raises(UserError, match=r"the prompt of task docvqa must hold \{question\}: 'publishd'"):
        chosen(given="publishd")


def test_the_prompts_of_a_recipe_are_told_against_those_of_training():
    same = chosen(trained=ANSWER, given="task", of_sources=["{question} Answer:"])
    assert same == AskedPrompt("sources", "{question} Answer:", "by the prompt of the recipe: '{question} Answer:'")
    other = chosen(trained=ANSWER, given="task", of_sources=["{question}?", None])
    assert other.text is None
    assert other.said == (
        "by the prompt of the recipe: '{question}?' and '{question}', though it was trained with '{question} Answer:'"
    )
    null = chosen(trained=ANSWER, given="task", of_sources=[None])
    assert null.text == "{question}" and null.said.endswith(", though it was trained with '{question} Answer:'")


def test_a_compared_model_without_a_prompt_of_its_own_is_asked_by_the_same():
    ours = chosen(trained=ANSWER)
    assert chosen(like=ours).text == "{question} Answer:" and "by the same prompt" in chosen(like=ours).said
    own = TrainedPrompts({"vqa": ["{question}\nBriefly."]}, {}, "its record")
    assert chosen(trained=own, like=ours).text == "{question}\nBriefly."
    assert chosen(like=chosen()).kind == "task"


def test_conversations_bring_their_prompts():
    task = custom_task("anls", format="messages")
    assert chosen(task, ANSWER).said == "by the messages of its rows"
    with pytest.raises(UserError, match="data of format messages brings its own prompts"):
        chosen(task, given="{question}")
    with pytest.raises(
        UserError, match=r"the published scripts have nothing like task custom \(data of format messages"
    ):
        published_task(task)


def test_as_published_is_said():
    assert chosen(published_task(DOCVQA), ANSWER, "base", given="published").said == (
        "as the published scripts do, in raw text: '<img>..</img>{question} Answer:'"
    )
    choice = chosen(published_task(find_task("multiple_choice")), given="published")
    assert "Context: {hint}" in choice.said and "likeliest letter" in choice.said


def test_a_runs_prompts_are_those_of_its_recipe(tmp_path):
    """With the format's own where a source names none; a folder without a run has those of its record."""
    train = [
        {"path": "a.jsonl", "format": "vqa", "prompt": "{question} Answer:"},
        {"path": "b.jsonl", "format": "vqa", "prompt": "{question} Answer:"},
        {"path": "c.jsonl", "format": "caption"},
        {"path": "d.jsonl", "format": "messages"},
    ]
    evaluate = {"data": {"path": "e.jsonl", "format": "vqa"}, "task": "docvqa"}
    recipe = write_recipe(tmp_path, data__train=train, evaluate=evaluate)
    assert trained_prompts(str(tmp_path), {"vqa": ("x {question}",)}).by_format == {"vqa": ("x {question}",)}
    assert trained_prompts(str(tmp_path), {}) == NOTHING
    (tmp_path / "run.json").write_text(json.dumps({}))
    found = trained_prompts(str(tmp_path), {})
    assert found.by_format == {"vqa": ["{question} Answer:"], "caption": ["Describe the image in English:"]}
    assert found.preferred == {"vqa": ["{question}"]} and found.found_in == str(recipe)
    # Scores while training are by the evaluate section, so a difference is said there too.
    told = "asked by '{question}', though it was trained with '{question} Answer:': set evaluate.data.prompt"
    assert asked_otherwise(load_recipe(recipe), DOCVQA) == told
    evaluate["data"]["prompt"] = "{question} Answer:"
    assert asked_otherwise(load_recipe(write_recipe(tmp_path, data__train=train, evaluate=evaluate)), DOCVQA) == ""
