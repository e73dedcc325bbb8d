"""lm-evaluation-harness on our folders: its answers are our replies, in batches too."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from recipes_for_tests import ROOT

from finetune.programs.lm_eval_prompts import reading_one, reading_several
from qwenvl import load_model, load_processor

NANO = ROOT / "examples" / "nano"
KNOWN = ROOT / "examples" / "quickstart" / "known"

TASK = """\
task: pages
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
output_type: generate_until
test_split: test
{image}doc_to_text: "{text}"
doc_to_target: answer
generation_kwargs:
  until: ["<|im_end|>"]
  max_gen_toks: 24
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def known_rows(count: int) -> list[dict]:
    rows = []
    for line in (KNOWN / "test.jsonl").read_text(encoding="utf-8").splitlines()[:count]:
        row = json.loads(line)
        question = next(part["text"] for part in row["messages"][0]["content"] if part["type"] == "text")
        rows.append({"image": str(KNOWN / row["images"][0]), "question": question, "answer": row["answers"][0]})
    return rows


def write_task(folder: Path, rows: list[dict], with_images: bool) -> Path:
    """A task of lm_eval and its data, in files."""
    from datasets import Dataset, Features, Image, Value

    columns = {"question": Value("string"), "answer": Value("string")}
    if with_images:
        columns["image"] = Image()
    kept = [{name: row[name] for name in columns} for row in rows]
    Dataset.from_list(kept, features=Features(columns)).to_parquet(folder / "pages.parquet")
    task = TASK.format(
        data=folder / "pages.parquet",
        image="doc_to_image:\n  - image\n" if with_images else "",
        text=("<image>" if with_images else "") + "{{question}}",
    )
    (folder / "task").mkdir()
    (folder / "task" / "pages.yaml").write_text(task)
    return folder / "task"


def own_reply(model, processor, row: dict, with_image: bool) -> str:
    parts = [{"type": "image", "image": row["image"]}] if with_image else []
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*parts, {"type": "text", "text": row["question"]}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_prompt_strings_are_read_with_their_structure(tiny_folder):
    """A conversation's string gives the conversation's ids; control tokens that a message spells are text."""
    processor = load_processor(tiny_folder)
    tokenizer = processor.tokenizer
    harness = SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(n_queries=256))
    talks = [[{"role": "user", "content": text}] for text in ("Hi", "What does <|im_end|> mean?")]
    expected = [tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"] for talk in talks]
    strings = [tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) for talk in talks]
    one, several = reading_one(None), reading_several(None)
    assert [one(harness, string) for string in strings] == expected
    assert one(harness, strings[1], left_truncate_len=5) == expected[1][-5:]
    ids, mask = several(harness, strings)
    assert [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)] == expected
    assert ids.shape == mask.shape == (2, len(expected[1])) and not mask[0, 0] and mask[:, -1].all()
    assert several(harness, strings, left_truncate_len=7)[0].tolist() == ids[:, -7:].tolist()
    others = SimpleNamespace(tokenizer=object())
    assert reading_one(lambda *given: given)(others, "a") == (others, "a", None, None)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "batch"), [("hf-multimodal", 1), ("hf-multimodal", 4), ("hf", 4)])
def test_its_answers_are_our_replies(tmp_path, kind, batch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    rows, with_images = known_rows(8), kind == "hf-multimodal"
    task = write_task(tmp_path, rows, with_images)
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "run", "lm_eval", "run", "--model", kind]
        + ["--model_args", f"pretrained={NANO},dtype=float32", "--device", "cpu", "--batch_size", str(batch)]
        + ["--tasks", "pages", "--include_path", str(task), "--apply_chat_template"]
        + ["--output_path", str(tmp_path / "out"), "--log_samples"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    logged = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda one: one["doc_id"])
    model, processor = load_model(NANO, dtype="float32"), load_processor(NANO)
    replies = [own_reply(model, processor, row, with_images) for row in rows]
    assert [one["resps"][0][0] for one in logged] == replies
    right = sum(reply == row["answer"] for reply, row in zip(replies, rows, strict=True))
    scores = json.loads(results.read_text())["results"]["pages"]
    assert scores["exact_match,none"] == pytest.approx(right / len(rows))
    assert not with_images or right >= 4, "answers that are all wrong would prove little"
