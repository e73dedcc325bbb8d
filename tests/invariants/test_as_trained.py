"""A model is what it was trained as, in every folder that holds it and in every command that opens it.

{base, chat} x {LoRA, Q-LoRA, full} x {run, adapter, merged, safetensors, nf4, qwen2} x {load_model, chat, evaluate}:
the same ids are asked, replies end at the same tokens, and the same replies come out. The default run has a
training in full and one in 4 bits; the others are `slow`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from asked_replies import Asked, Listener
from recipes_for_tests import IMAGES, ROOT, TINY, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.chat import terminal_chat
from finetune.evaluation.evaluate import Evaluation, EvaluationSource, evaluate
from finetune.evaluation.tasks import custom_task
from finetune.export.export import export
from finetune.merge.merge import merge
from finetune.recipe import load_recipe
from finetune.terminal import say_nothing
from finetune.training.train import train
from qwenvl import load_model, load_processor

QUESTION, PROMPT, ANSWER = "Is it small?", "{question} One word.", "Yes it is."
SYSTEM = "You are a helpful assistant."
END_OF_TEXT, IM_START, IM_END = 512, 513, 514  # of the tiny tokenizer
LIMIT = 24

ADAPTER = {"r": 8, "alpha": 16, "dropout": 0.0}
KINDS = {
    "LoRA": {"adapter": ADAPTER},
    "Q-LoRA": {"adapter": ADAPTER, "model__quantization": "nf4"},
    "full": {"adapter": None, "freeze__language": False},
}
THIN = [("base", "full"), ("base", "Q-LoRA")]
WHOLE = [(start, kind) for start in ("base", "chat") for kind in KINDS]


@pytest.fixture
def listener(monkeypatch):
    return Listener(monkeypatch)


def trained_run(folder: Path, start: str, kind: str) -> Path:
    """A run on a base or chat checkpoint that has learned one answer and to end its reply."""
    checkpoint = folder / "checkpoint"
    shutil.copytree(TINY, checkpoint)
    settings = json.loads((checkpoint / "generation_config.json").read_text())
    settings |= {"chat_format": "chatml" if start == "chat" else "raw", "eos_token_id": END_OF_TEXT}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    rows = [{"image": str(image), "question": QUESTION, "answers": ANSWER} for image in IMAGES[:2]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(folder / "rows.jsonl"), "format": "vqa", "prompt": PROMPT}
    step = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 30, "save_steps": 100}
    changes = {f"train__{key}": value for key, value in step.items()}
    changes |= {"train__learning_rate": 3e-3, "data__train": source, "evaluate": None}
    recipe = write_recipe(folder, model__path=str(checkpoint), **changes, **KINDS[kind])
    return train(load_recipe(recipe, []), say=say_nothing)


def by_load_model(path: Path, listener: Listener) -> Asked:
    """As the README's Python does it."""
    model, processor = load_model(path), load_processor(path)
    content = [{"type": "image", "image": str(IMAGES[0])}]
    content.append({"type": "text", "text": PROMPT.replace("{question}", QUESTION)})
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    model.generate(**prompt, max_new_tokens=LIMIT, do_sample=False)
    return listener.last()


def by_chat(path: Path, listener: Listener, capsys) -> Asked:
    terminal_chat.chat(str(path), images=[IMAGES[0]], once=QUESTION, max_new_tokens=LIMIT)
    said = capsys.readouterr()
    assert "asked as a chat model" in said.err and PROMPT in said.err
    return listener.last()


def by_evaluate(path: Path, listener: Listener, rows: Path, out: Path) -> Asked:
    task = custom_task("exact_match", max_new_tokens=LIMIT)
    source = EvaluationSource(str(rows), limit=1)
    evaluate(Evaluation(str(path), task, (source,), images_root=str(ROOT), out=out), say=say_nothing)
    return listener.last()


def by_qwen2(path: Path, prompt: tuple[int, ...]) -> Asked:
    """The exported language model, in Transformers' own class, from the embeddings that the folder's script makes."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert tokenizer.eos_token_id == IM_END
    original = load_model(path.parent / "run") if (path.parent / "run" / "model").is_dir() else None
    original = original or load_model(path.parent / "merged")
    pixels = load_processor(path.parent / "checkpoint").image_processor(str(IMAGES[0]), return_tensors="pt")
    ids = torch.tensor([prompt])
    embeddings = model.get_input_embeddings()(ids)
    pads = ids[0] == original.config.image_token_id
    embeddings[0, pads] = original.get_image_features(pixels["pixel_values"])[0]
    stop = model.generation_config.eos_token_id
    new = model.generate(
        inputs_embeds=embeddings, attention_mask=torch.ones_like(ids), max_new_tokens=LIMIT, do_sample=False
    )[0].tolist()
    return Asked(
        prompt, frozenset(stop), tuple(new[: next(place for place, token in enumerate(new) if token in stop)])
    )


@pytest.mark.parametrize(
    ("start", "kind"),
    [pytest.param(*case, marks=[] if case in THIN else pytest.mark.slow, id="-".join(case)) for case in WHOLE],
)
def test_the_same_model_in_every_folder_and_command(start, kind, tmp_path, listener, capsys):
    run = trained_run(tmp_path, start, kind)
    folders = {"run": run, "result": run / ("model" if kind == "full" else "adapter")}
    if kind != "full":
        folders["merged"] = merge(run, tmp_path / "merged", check=False, say=say_nothing)
    whole = str(folders.get("merged", run))
    for form in ("safetensors", "nf4", "qwen2"):
        folders[form] = export(whole, form, out=tmp_path / form, say=say_nothing)

    expected = by_load_model(run, listener)
    tokenizer = load_processor(run).tokenizer
    assert expected.stop == {IM_END, IM_START, END_OF_TEXT}
    assert tokenizer.decode(list(expected.reply)) == ANSWER  # it learned the answer, and to end its reply
    system = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    assert tokenizer.decode(list(expected.prompt)).startswith(f"{system}<|im_start|>user\nPicture 1")
    for name, folder in folders.items():
        if name == "qwen2":
            assert by_qwen2(folder, expected.prompt) == expected
            continue
        assert by_load_model(folder, listener) == expected, f"load_model of {name}"
        assert by_chat(folder, listener, capsys) == expected, f"chat of {name}"
        asked = by_evaluate(folder, listener, tmp_path / "rows.jsonl", tmp_path / "evaluations" / name)
        assert asked == expected, f"evaluate of {name}"
