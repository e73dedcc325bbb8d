"""What the model replies to a few evaluation rows, before and after training, for the report."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.collate import Collator
from qwenvl import load_image
from qwenvl.chat import render_chat

PREDICTIONS = "predictions.jsonl"
IMAGE_FOLDER = "predictions"
THUMBNAIL = 640  # pixels of the longer side; enough to read a receipt in the report


def question_and_answer(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str] | None:
    """The conversation up to its last reply, and that reply; None where it does not end in one."""
    if messages[-1]["role"] != "assistant":
        return None
    answer = messages[-1]["content"]
    if not isinstance(answer, str):
        answer = "".join(part["text"] for part in answer if part["type"] == "text")
    return list(messages[:-1]), answer


def write_predictions(
    model: torch.nn.Module, collator: Collator, rows: Sequence[int], *, run: Path, when: str, max_new_tokens: int
) -> None:
    """Reply to samples greedily and append the replies to the run's predictions.

    Args:
        model: in any mode; left in it.
        collator: of the samples that `rows` are indices into.
        run: the run folder; images go into it as small JPEGs, named by content.
        when: "before" or "after"; earlier records of the same are replaced.
    """
    was_training = model.training
    model.eval()
    records = []
    for row in rows:
        sample = collator.samples[row]
        parts = question_and_answer(sample.messages)
        if parts is None:
            continue
        question, target = parts
        prompt = render_chat(
            question,
            collator.tokenizer,
            add_generation_prompt=True,
            grounding=collator.grounding,
            n_queries=collator.n_queries,
        )
        images = [load_image(source, access=sample.access, name=str(sample.origin)) for source in prompt.images]
        ids = torch.tensor([prompt.ids], device=model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            pixels = collator.image_processor(images, do_normalize=False, return_tensors="pt")["pixel_values"]
            inputs["pixel_values"] = pixels.to(model.device)
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        reply = collator.tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True, keep_grounding=True)
        records.append(
            {
                "when": when,
                "origin": str(sample.origin),
                "question": _last_question(question),
                "images": [_keep_image(image, run) for image in images],
                "target": target,
                "prediction": reply,
            }
        )
    model.train(was_training)
    _replace_records(run / PREDICTIONS, when, records)


def _last_question(messages: Sequence[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text").strip()


def _keep_image(image, run: Path) -> str:
    folder = run / IMAGE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(image.tobytes()).hexdigest()[:16] + ".jpg"
    if not (folder / name).exists():
        small = image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        small.save(folder / name, "JPEG", quality=88)
    return f"{IMAGE_FOLDER}/{name}"


def _replace_records(file: Path, when: str, records: list[dict[str, Any]]):
    kept = []
    if file.is_file():
        kept = [line for line in file.read_text().splitlines() if json.loads(line)["when"] != when]
    lines = kept + [json.dumps(record, ensure_ascii=False) for record in records]
    partial = file.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in lines))
    partial.replace(file)
