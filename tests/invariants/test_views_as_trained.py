"""A model that was trained with views is shown the same pictures in every folder that holds it, by every command."""

import json
import shutil

import pytest
import torch
from asked_replies import Listener
from recipes_for_tests import IMAGES, ROOT, write_recipe
from said import collect

from finetune.chat import terminal_chat
from finetune.evaluation.evaluate import Evaluation, EvaluationSource, evaluate
from finetune.evaluation.tasks import custom_task
from finetune.export.export import export
from finetune.export.qwen2_prompt_embeddings import PromptEncoder
from finetune.merge.merge import merge
from finetune.recipe import load_recipe
from finetune.terminal import say_nothing
from finetune.training.train import train
from qwenvl import load_model, load_processor
from qwenvl.checkpoint.record import read_record
from qwenvl.published import chat, from_list_format
from qwenvl.views import Views

QUESTION, PROMPT = "Is it small?", "{question} One word."
VIEWS = Views(True, (1, 2), 0.2)
LIMIT = 4


@pytest.fixture
def listener(monkeypatch):
    return Listener(monkeypatch)


def recipe_of(folder, **changes):
    folder.mkdir(exist_ok=True)
    rows = [{"image": str(image), "question": QUESTION, "answers": "Yes it is."} for image in IMAGES[:3]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(folder / "rows.jsonl"), "format": "vqa", "prompt": PROMPT}
    evaluated = {"data": source, "task": "custom", "metric": "exact_match", "sample": 1, "max_new_tokens": LIMIT}
    steps = {"max_steps": 2, "save_steps": 1, "gradient_accumulation_steps": 1, "eval_strategy": "no"}
    settings = {f"train__{key}": value for key, value in steps.items()}
    settings |= {"data__train": source, "data__views": VIEWS.to_json(), "evaluate": evaluated, **changes}
    return write_recipe(folder, **settings)


def same(one, other) -> bool:
    return one == other and torch.allclose(one.features, other.features, atol=1e-5)


def test_the_same_pictures_in_every_folder_and_command(tmp_path, listener, capsys):
    run = train(load_recipe(recipe_of(tmp_path)), say=say_nothing)
    before = listener.asked[0]
    merged = merge(run, tmp_path / "merged", say=say_nothing)
    exported = export(str(merged), "qwen2", out=tmp_path / "qwen2", say=say_nothing)
    for folder in (run / "adapter", merged, exported):
        assert read_record(folder).views == VIEWS
    listener.asked.clear()

    text = PROMPT.replace("{question}", QUESTION)
    content = [{"type": "image", "image": str(IMAGES[0])}, {"type": "text", "text": text}]
    asked = [{"role": "user", "content": content}]
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}

    def by_load_model(folder):
        model, processor = load_model(folder), load_processor(folder)
        prompt = processor.apply_chat_template(asked, **how)
        model.generate(**prompt, max_new_tokens=LIMIT, do_sample=False)
        return listener.last()

    expected = by_load_model(run)
    decoded = load_processor(run).tokenizer.decode(list(expected.prompt))
    assert [f"Picture {number}:<img>" in decoded for number in (1, 2, 3, 4)] == [True, True, True, False]
    # Before training the model was asked the same, about as many pictures.
    assert before.prompt == expected.prompt and before.features.shape == expected.features.shape
    terminal_chat.chat(str(run), images=[IMAGES[0]], once=QUESTION, max_new_tokens=LIMIT)
    assert "each image is shown as the page and its 1 x 2 parts, overlap 0.2" in capsys.readouterr().err
    assert same(listener.last(), expected)
    task, source = custom_task("exact_match", max_new_tokens=LIMIT), EvaluationSource(str(tmp_path / "rows.jsonl"))
    asking = Evaluation(str(merged), task, (source,), images_root=str(ROOT), limit=1, out=tmp_path / "evaluation")
    evaluate(asking, say=say_nothing)
    assert same(listener.last(), expected)
    query = from_list_format([{"image": str(IMAGES[0])}, {"text": text}])
    model = load_model(merged)
    chat(model, load_processor(merged), query, max_new_tokens=LIMIT, do_sample=False)
    assert same(listener.last(), expected)
    prompt = PromptEncoder(exported)(asked)
    assert prompt.input_ids[0].tolist() == list(expected.prompt)
    pads = prompt.input_ids[0] == model.config.image_token_id
    assert torch.allclose(prompt.embeddings[0, pads], expected.features, atol=1e-5)


@pytest.mark.parametrize("cache", ["off", pytest.param("disk", marks=pytest.mark.slow)])
def test_a_resumed_run_is_bit_identical_and_other_views_are_refused(tmp_path, cache):
    file = recipe_of(tmp_path, evaluate=None, data__vision_cache=cache)
    run = train(load_recipe(file), say=say_nothing)
    result = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    description = json.loads((run / "run.json").read_text())
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-2")
    (run / "run.json").write_text(json.dumps(description | {"status": "running"}))
    with pytest.raises(ValueError, match=r"recipe\.data\.views\.overlap: 0\.2 -> 0\.3"):
        train(load_recipe(file, ["data.views.overlap=0.3"]), say=say_nothing)
    said: list[str] = []
    train(load_recipe(file), say=collect(said))
    assert any("from step 1" in line for line in said)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == result
