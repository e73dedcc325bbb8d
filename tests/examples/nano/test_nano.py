"""The bundled nano checkpoint reads: it answers about bundled pages; the quickstart teaches it a new kind of them."""

import json
import re
import subprocess
import sys

import pytest
import torch
from recipes_for_tests import ROOT, finetune
from safetensors import safe_open

sys.path.insert(0, str(ROOT))  # the examples are not installed

from finetune.cli import main
from finetune.evaluation.predictions import split_last_reply
from finetune.metrics.answers import anls
from qwenvl import load_model, load_processor

NANO = ROOT / "examples" / "nano"
QUICKSTART = ROOT / "examples" / "quickstart"
GOLDEN = ROOT / "tests" / "data" / "nano.json"


def rows(name):
    return [json.loads(line) for line in (QUICKSTART / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@torch.inference_mode()
def reply(model, processor, row, folder):
    """The greedy reply to a row's last question."""
    images = iter(row["images"])
    asked, _ = split_last_reply(row["messages"])
    for message in asked:
        for part in message["content"]:
            if part["type"] == "image":
                part["image"] = str(folder / next(images))
    inputs = processor.apply_chat_template(
        asked, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ids = model.generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_it_is_a_small_checkpoint_in_the_published_layout():
    assert 2e6 < sum(path.stat().st_size for path in NANO.iterdir()) < 10e6
    published = json.loads((ROOT / "tests" / "data" / "checkpoint_layout.json").read_text())
    with safe_open(NANO / "model.safetensors", "pt") as file:
        tensors = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118

    def of_any_layer(names):
        return {re.sub(r"\.(h|resblocks)\.\d+\.", r".\1.*.", name) for name in names}

    # Tower and language model are equally wide here, so the adapter has nothing to project.
    projection = {name for name in published["tensors"] if name.endswith("attn_pool.kv_proj.weight")}
    assert of_any_layer(tensors) == of_any_layer(published["tensors"]) - projection
    assert set(tensors.values()) == {"BF16"}
    config = json.loads((NANO / "config.json").read_text())
    assert config["architectures"] == ["QWenLMHeadModel"]
    assert (NANO / "qwen.tiktoken").read_bytes().count(b"\n") == 528


def test_its_readme_begins_with_the_card_that_a_making_writes():
    """Scores are added below it."""
    card = (NANO / "making" / "card.md").read_text(encoding="utf-8")
    assert (NANO / "README.md").read_text(encoding="utf-8").startswith(card)


def test_it_still_reads_ten_bundled_documents():
    """Replies as recorded with float32 arithmetic (`tests/data/nano.json` says how), and most of them right."""
    model, processor = load_model(NANO, dtype=torch.float32), load_processor(NANO)
    asked = rows("known/test")[-10:]
    replies = [reply(model, processor, row, QUICKSTART / "known") for row in asked]
    assert replies == json.loads(GOLDEN.read_text(encoding="utf-8"))["replies"]
    assert sum(anls(said, row["answers"]) for said, row in zip(replies, asked, strict=True)) >= 9


def test_one_page_does_not_answer_for_another():
    """The same question about ten pages of one kind: replies come from the images."""
    model, processor = load_model(NANO, dtype=torch.float32), load_processor(NANO)
    row = next(row for row in rows("known/test") if row["family"] == "form")
    pages = [other["images"] for other in rows("known/test") if other["family"] == "form"][:10]
    said = {reply(model, processor, {**row, "images": page}, QUICKSTART / "known") for page in pages}
    assert len(said) >= 5


@pytest.mark.parametrize(
    "changes",
    [("model.quantization=nf4",), ("adapter.train_embeddings=true",)],
    ids=["qlora", "base"],
)
def test_variants_of_the_quickstart_run(changes, tmp_path):
    output = f"output={tmp_path / 'run'}"
    short = ("train.max_steps=2", "evaluate.data.0.limit=2", "evaluate.data.1.limit=2", "data.train.0.limit=32")
    assert main([str(ROOT / "recipes" / "quickstart.yaml"), *short, *changes, output]) == 0
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["status"] == "finished" and described["steps"] == 2
    assert bool(described["quantized"]) == ("nf4" in changes[0])
    assert bool(described["parameters"]["embeddings"]["trained"]) == ("embeddings" in changes[0])


@pytest.mark.slow
def test_the_quickstart_learns_the_new_documents(tmp_path):
    """As a user runs it; most of the known ones are kept, and the merged model has both."""
    run = tmp_path / "run"
    finetune("recipes/quickstart.yaml", f"output={run}", cwd=ROOT, timeout=1200)
    scores = json.loads((run / "run.json").read_text())["score"]["sources"]
    assert scores["boarding"]["before"] <= 0.4
    assert scores["boarding"]["after"] >= 0.85
    assert scores["known"]["after"] >= scores["known"]["before"] - 0.05
    assert (run / "report.html").read_text(encoding="utf-8").count("data:image/") >= 3
    finetune("merge", run, "--to", tmp_path / "merged", cwd=ROOT)
    asked = [sys.executable, "-m", "finetune", "evaluate", tmp_path / "merged", "--recipe", "recipes/quickstart.yaml"]
    asked += ["--out", tmp_path / "evaluation"]  # else under runs/, where another merged model's may be
    said = subprocess.run([*map(str, asked)], cwd=ROOT, capture_output=True, text=True, timeout=600, check=True).stdout
    merged = float(re.search(r"^anls +([\d.]+)", said, re.MULTILINE)[1])
    assert merged >= json.loads((run / "run.json").read_text())["score"]["after"] - 0.05
