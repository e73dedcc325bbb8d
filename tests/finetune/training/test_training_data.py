"""What a run reads: the questions of its task are asked under the system message of its training."""

import json

import pytest
from recipes_for_tests import IMAGES, TINY, write_recipe

from finetune.recipe import load_recipe
from finetune.terminal import say_nothing
from finetune.training.training_data import read_data
from qwenvl import load_processor

DEFAULT = "You are a helpful assistant."


@pytest.mark.parametrize(
    ("systems", "asked"),
    [(["Be brief."] * 3, "Be brief."), (["Be brief.", "Be long.", "Be brief."], DEFAULT), ([None] * 3, DEFAULT)],
)
def test_questions_are_asked_under_the_system_message_of_training(tmp_path, systems, asked):
    rows = []
    for number, system in enumerate(systems):
        before = [] if system is None else [{"role": "system", "content": system}]
        turns = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "Yes."}]
        rows.append({"messages": [*before, *turns]})
    question = {"image": str(IMAGES[0]), "question": "What is it?", "answers": ["a"]}
    evaluate = {"data": {"path": str(tmp_path / "questions.jsonl"), "format": "vqa"}, "task": "docvqa"}
    recipe = load_recipe(write_recipe(tmp_path, evaluate=evaluate))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    processor = load_processor(TINY)
    data = read_data(recipe, processor, say_nothing, show_progress=False)
    prompt = processor.tokenizer.decode(data.task.questions[0].render(processor.tokenizer).ids)
    assert prompt.startswith(f"<|im_start|>system\n{asked}<|im_end|>\n<|im_start|>user\nPicture 1")
