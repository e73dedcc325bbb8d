"""Sources of evaluation questions for tests: small files with the columns of the public sets."""

import json
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from finetune.evaluation.questions import Questions
from finetune.evaluation.tasks import find_task

TEN = ["4"] * 6 + ["5", "five", "a 5", "6"]
CONVERSATION = {
    "messages": [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A form."},
        {"role": "user", "content": "And the total?"},
        {"role": "assistant", "content": "12.40"},
    ],
    "images": ["a.png"],
}

# One row of each task, as the public data has it, with the image as a path.
ROWS = {
    "docvqa": {"questionId": 337, "question": "What?", "answers": ["4", "four"], "docId": 1, "image": "a.png"},
    "infographicvqa": {"questionId": "98313", "question": "What?", "answers": ["4"], "image": "a.png"},
    "chartqa": {"image": "a.png", "query": "What?", "label": ["4"], "human_or_machine": 0},
    "textvqa": {"question_id": 34602, "question": "What?", "answers": TEN, "image": "a.png"},
    "vqav2": {
        "question_id": 5,
        "question": "What?",
        "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate(TEN)],
        "image": "a.png",
    },
    "ocrvqa": {"image": "a.png", "questions": ["Who?", "What?"], "answers": ["me", "4"]},
    "gqa": {"id": "201", "question": "What?", "answer": "4", "fullAnswer": "It is 4.", "image": "a.png"},
    "refcoco": {"question_id": "9", "image": "a.png", "answer": ["dog", "the dog"], "bbox": [20, 10, 40, 30.5]},
    "flickr30k": {"image": "a.png", "caption": ["A dog.", "The dog runs."]},
    "nocaps": {"image_id": 8, "image": "a.png", "annotations_captions": ["A dog."]},
    "screenspot": {"image": "a.png", "instruction": "close", "bbox": [0.1, 0.2, 0.5, 0.5], "data_type": "icon"},
    "multiple_choice": {"question": "What?", "options": ["dog", "4"], "answer": "1", "image": "a.png"},
}
ROWS["fields"] = {"image": "a.png", "total": "4"}
ROWS["refcoco+"] = ROWS["refcocog"] = ROWS["refcoco"]


def source(path, **given) -> SimpleNamespace:
    defaults = {"config": None, "split": None, "format": None, "columns": {}, "prompt": None, "box_form": None}
    defaults |= {"fields": ["total"], "reply": "value", "missing": None, "nested": [], "prompts": None}
    return SimpleNamespace(
        path=str(path),
        **defaults
        | {
            "weight": 1.0,
            "limit": None,
            "streaming": False,
            "encoding": None,
            "delimiter": None,
            "part": None,
            "annotations": None,
        }
        | given,
    )


def write(folder: Path, rows, name: str = "data.jsonl") -> Path:
    """Rows in a file of a folder that has the images a.png (200 x 100), b.png and c.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for image, shade in (("a", 40), ("b", 80), ("c", 120)):
        Image.new("RGB", (200, 100), (shade, 0, 0)).save(folder / f"{image}.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("".join(line + "\n" for line in lines))
    return folder / name


def ask(folder: Path, task, *rows, source_with=None, **given) -> Questions:
    """The questions of some rows; `source_with` goes to the source, the rest to `Questions`."""
    task = find_task(task) if isinstance(task, str) else task
    return Questions(source(write(folder, rows), **source_with or {}), task, **given)
