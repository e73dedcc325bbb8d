"""Every shipped recipe trains: on the tiny checkpoint, with local data that has the columns of the public one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image
from huggingface_hub import constants
from PIL import Image as PILImage
from recipes_for_tests import IMAGES, ROOT, TINY
from said import collect

from finetune.recipe import load_recipe
from finetune.training.train import train
from qwenvl import load_model

RECIPES = ROOT / "recipes"


def parquet(folder: Path, name: str, **columns) -> Path:
    file = folder / f"{name}.parquet"
    data = Dataset.from_dict(columns)
    if "image" in columns:
        data = data.cast_column("image", Image())
    data.to_parquet(file)
    return file


def pictures(count: int) -> list[dict]:
    """Images inside the file, as the hub's data sets hold them."""
    files = [IMAGES[index % len(IMAGES)] for index in range(count)]
    return [{"bytes": file.read_bytes(), "path": file.name} for file in files]


def document_questions(folder, name):
    return parquet(
        folder,
        name,
        questionId=[str(n) for n in range(6)],
        question=[f"What is the total on page {n}?" for n in range(6)],
        question_types=[["form"]] * 6,
        image=pictures(6),
        docId=list(range(6)),
        answers=[["$12.50", "12.50"], ["7"], ["a"], ["b"], ["c"], ["d"]],
    )


def chart_questions(folder, name):
    return parquet(
        folder,
        name,
        image=pictures(6),
        query=[f"How high is bar {n}?" for n in range(6)],
        label=[[str(n)] for n in range(6)],
        human_or_machine=[0, 1] * 3,
    )


def text_questions(folder, name):
    return parquet(
        folder,
        name,
        image=pictures(6),
        question=[f"What does sign {n} say?" for n in range(6)],
        answers=[["stop"] * 7 + ["halt"] * 3] * 6,
        ocr_tokens=[["stop"]] * 6,
    )


def phrases_with_corners(folder, name):
    """jxu124/refcoco: paths instead of pixels, boxes by their corners."""
    images = folder / "coco" / "train2014"
    images.mkdir(parents=True)
    for picture in IMAGES:
        shutil.copy(picture, images / picture.name)
    paths = [f"coco/train2014/{IMAGES[n % len(IMAGES)].name}" for n in range(6)]
    sizes = [PILImage.open(folder / path).size for path in paths]
    boxes = [[0, 0, width / 2, height / 2] for width, height in sizes]
    sentences = [[{"raw": "The box.", "sent": "the box", "sent_id": n, "tokens": ["the", "box"]}] for n in range(6)]
    return parquet(folder, name, image_path=paths, sentences=sentences, bbox=boxes)


def phrases_with_sizes(folder, name):
    """lmms-lab/RefCOCO: pixels, boxes by corner and size."""
    sizes = [PILImage.open(IMAGES[n % len(IMAGES)]).size for n in range(6)]
    return parquet(
        folder,
        name,
        image=pictures(6),
        question=["Please carefully observe the area circled in the image."] * 6,
        answer=[["left box", "the box"]] * 6,
        bbox=[[0, 0, width / 2, height / 2] for width, height in sizes],
    )


def captions(folder, name):
    return parquet(folder, name, image=pictures(6), caption=[["A box.", "A crimson box."]] * 6)


def conversations(folder, name):
    rows = []
    for row in range(6):
        shutil.copy(IMAGES[0], folder / "page.png")
        grounded = "<ref>the total</ref><box>(10,20),(300,400)</box>"
        rows.append(
            {
                "id": str(row),
                "conversations": [
                    {
                        "from": "user",
                        "value": "Picture 1: <img>page.png</img>\nPicture 2: <img>page.png</img>\nAlike?",
                    },
                    {"from": "assistant", "value": f"Yes, number {row}."},
                    {"from": "user", "value": "Frame the total."},
                    {"from": "assistant", "value": grounded},
                ],
            }
        )
    file = folder / f"{name}.json"
    file.write_text(json.dumps(rows))
    return file


DATA = {
    "docvqa_lora": (document_questions, document_questions),
    "docvqa_lora_24gb": (document_questions, document_questions),
    "docvqa_qlora": (document_questions, document_questions),
    "docvqa_qlora_8gb": (document_questions, document_questions),
    "docvqa_qlora_6gb": (document_questions, document_questions),
    "chartqa_lora": (chart_questions, chart_questions),
    "textvqa_lora": (text_questions, text_questions),
    "grounding_lora": (phrases_with_corners, phrases_with_sizes),
    "caption_lora": (captions, captions),
    "chat_lora": (conversations, conversations),
    "base_lora": (conversations, conversations),
    "full_sft": (conversations, conversations),
}


@pytest.fixture(autouse=True)
def nothing_is_compiled():
    """The tiny tower has an odd width, for which bitsandbytes would compile a function of its own first."""
    with torch.compiler.set_stance("force_eager"):
        yield


SCORED = {
    "docvqa_lora": "eval_anls",
    "docvqa_lora_24gb": "eval_anls",
    "docvqa_qlora": "eval_anls",
    "docvqa_qlora_8gb": "eval_anls",
    "docvqa_qlora_6gb": "eval_anls",
    "chartqa_lora": "eval_relaxed_accuracy",
    "textvqa_lora": "eval_vqa_score",
    "grounding_lora": "eval_grounding",
    "caption_lora": "eval_cider_d",
}
"""What the recipes with a task log, before training and once in it."""


def test_every_recipe_is_here():
    assert {file.stem for file in RECIPES.glob("*.yaml")} == {*DATA, "quickstart"}


# Recipes that differ from docvqa_qlora in what only a card of that size feels.
SLOW = ("docvqa_qlora_6gb", "docvqa_qlora_8gb")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in DATA]
)
def test_a_recipe_end_to_end(name, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))  # where features of images are kept
    make_train, make_eval = DATA[name]
    overrides = [
        f"model.path={TINY}",
        "model.dtype=float32",
        f"data.train.path={make_train(tmp_path, 'train')}",
        f"data.images_root={tmp_path}",
        "data.workers=0",
        f"evaluate.data.path={make_eval(tmp_path, 'eval')}",
        "evaluate.predictions=1",
        "evaluate.max_new_tokens=4",
        "train.max_steps=2",
        "train.per_device_train_batch_size=2",
        "train.gradient_accumulation_steps=1",
        "train.logging_steps=1",
        "train.learning_rate=1e-2",
        "train.warmup_steps=0",
        f"output={tmp_path / 'run'}",
    ]
    said = []
    run = train(load_recipe(RECIPES / f"{name}.yaml", overrides), say=collect(said))
    assert (run / "report.html").is_file()
    description = json.loads((run / "run.json").read_text())
    assert description["status"] == "finished" and description["rows"]["train"]["bad"] == 0
    trained = {component for component, count in description["parameters"].items() if count["trained"]}
    assert trained == {
        "base_lora": {"adapter", "embeddings"},
        "full_sft": {"language", "embeddings", "resampler"},
    }.get(name, {"adapter"})
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 2 and any("eval_loss" in record for record in records)
    if name in SCORED:
        assert [record["step"] for record in records if SCORED[name] in record] == [0, 2]
        assert {"before", "after"} <= description["score"].keys()
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [record["when"] for record in predictions] == ["before", "after"]
    load_model(run)
