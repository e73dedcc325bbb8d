"""Every example of finetune/data/README.md is trained on, in files of every kind, and evaluated on where it can be:
tiny checkpoint, one step, and exactly the replies that the page shows are learned.

By default all examples are one run of texts and one of boxes; each by itself, with what fits it, is slow.
"""

import gzip
import json
import math
import tarfile
from itertools import chain
from pathlib import Path

import datasets
import openpyxl
import pytest
from data_page import LOCAL, told_replies, write_page_images, write_section
from files_of_pages import pdf
from recipes_for_tests import TINY
from said import collect

from finetune.recipe import parse_recipe
from finetune.training.train import train
from finetune.training.trainer import QwenVLTrainer
from qwenvl import QwenVLTokenizer
from qwenvl.text.chat import IGNORED

ROWS = [
    {"image": "receipt.png", "question": "What is the total?", "answers": "$ 12.40"},
    {"image": "photo.jpg", "question": "Date, please?", "answers": "007"},
]
REPLIES = [["$ 12.40"], ["007"]]
BOXES = ("grounding", "COCO", "Label Studio", "LabelMe", "CVAT", "VIA", "YOLO")
DETECTION = {"task": "custom", "metric": "detection", "max_new_tokens": 80}
SCORED_AS = {
    **dict.fromkeys(("qwen_json", "swift", *BOXES), DETECTION),
    "caption": {"task": "custom", "metric": "cider_d"},
    "Parquet": {"task": "custom", "metric": "cider_d"},
    "fields": {"task": "fields"},
}
"""Section -> how replies to it are scored; by ANLS elsewhere."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a section's files into a folder of its own; gives its sources with absolute paths."""

    def written(section):
        folder = tmp_path / section
        write_page_images(folder)
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            return [{**one, "path": str(folder / one["path"])} for one in write_section(section)]

    return written


@pytest.fixture
def learned(monkeypatch):
    """(sample, its runs of trained tokens as text) of all steps, and the losses."""
    tokenizer = QwenVLTokenizer.from_pretrained(TINY)
    found, losses = {}, []
    step = QwenVLTrainer.training_step

    def look(self, model, inputs, *args, **kwargs):
        ids, labels = inputs["input_ids"][0].tolist(), inputs["labels"][0].tolist()
        start = 0
        for sample, length in zip(inputs["samples"].tolist(), inputs["sequence_lengths"].tolist(), strict=True):
            found[sample] = trained_texts(ids[start : start + length], labels[start : start + length], tokenizer)
            start += length
        loss = step(self, model, inputs, *args, **kwargs)
        losses.append(float(loss))
        return loss

    monkeypatch.setattr(QwenVLTrainer, "training_step", look)
    return found, losses


def trained_texts(ids, labels, tokenizer) -> list[str]:
    runs, before = [], IGNORED
    for one, label in zip(ids, labels, strict=True):
        if label != IGNORED:
            assert label == one
            runs += [[one]] if before == IGNORED else []
            if before != IGNORED:
                runs[-1].append(one)
        before = label
    return [tokenizer.decode(run) for run in runs]


def learn(folder: Path, sources, replies, learned, evaluate=None, **data):
    """Train one step on all samples of the sources, and compare what is learned with `replies`, sample by sample."""
    recipe = {
        "model": {"path": str(TINY), "dtype": "float32"},
        "adapter": {"r": 2},
        "data": {"train": sources, "workers": 0, "max_length": None, **data},
        "train": {
            "max_steps": 1,
            "per_device_train_batch_size": len(replies),
            "logging_steps": 1,
            "gradient_checkpointing": False,
        },
        "evaluate": evaluate,
        "output": str(folder / "run"),
    }
    said: list[str] = []
    run = train(parse_recipe(json.dumps(recipe)), say=collect(said))
    found, losses = learned
    assert len(losses) == 1 and math.isfinite(losses[0]) and losses[0] > 0
    texts = [[text.replace("\n", " ") for text in found[sample]] for sample in sorted(found)]
    assert texts == [[f"{reply}<|im_end|>" for reply in one] for one in replies]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if evaluate is not None:
        assert any(math.isfinite(record.get("eval_loss", math.nan)) for record in records)
        summary = json.loads((run / "run.json").read_text())["score"]
        assert all(summary[when] >= 0 and math.isfinite(summary[when]) for when in ("before", "after")), summary
    return run


def scored(sources, how) -> dict:
    named = [{**one, "name": f"s{number}"} for number, one in enumerate(sources)]
    return {"data": named, "predictions": 0, "sample": 2, "max_new_tokens": 4, **how}


# --- kinds of files --------------------------------------------------------------------------------------------------


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def delimited(rows, mark) -> str:
    quoted = [[f'"{value}"' for value in row.values()] for row in rows]
    return "\n".join(mark.join(line) for line in [list(rows[0]), *quoted]) + "\n"


def workbook(path: Path, rows) -> None:
    book = openpyxl.Workbook()
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append(list(row.values()))
    book.save(path)


def tar(path: Path, rows) -> None:
    with tarfile.open(path, "w") as file:
        for number, row in enumerate(rows):
            told = path.parent / f"{number}.json"
            told.write_text(json.dumps({"question": row["question"], "answers": row["answers"]}))
            # The datasets library wants all rows of one tar to have the same endings.
            file.add(path.parent / row["image"], f"{number}.jpg")
            file.add(told, told.name)


def several(path: Path, rows) -> None:
    for number, row in enumerate(rows):
        (path.parent / f"part{number}.jsonl").write_text(jsonl([row]))


KINDS = {
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "objects.json": lambda path, rows: path.write_text(" ".join(map(json.dumps, rows))),
    "rows.jsonl": lambda path, rows: path.write_text(jsonl(rows)),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(jsonl(rows).encode())),
    "rows.csv": lambda path, rows: path.write_text(delimited(rows, ",")),
    "marks.csv": lambda path, rows: path.write_text(delimited(rows, ";")),
    "utf16.csv": lambda path, rows: path.write_text(delimited(rows, ","), encoding="utf-16"),
    "rows.tsv": lambda path, rows: path.write_text(delimited(rows, "\t")),
    "rows.csv.gz": lambda path, rows: path.write_bytes(gzip.compress(delimited(rows, ",").encode())),
    "rows.xlsx": workbook,
    "rows.tar": tar,
    "rows.parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(str(path)),
    "part*.jsonl": several,
}
"""Path of a source -> how its rows are written."""


def write_kind(folder: Path, kind: str) -> list[dict]:
    folder.mkdir()
    write_page_images(folder)
    path = folder / "data" / kind
    KINDS[kind](path, ROWS)
    return [{"path": str(path), "format": "vqa"}]


def write_pages(folder: Path) -> list[dict]:
    """A row with a page of a PDF, and one with all of its pages."""
    folder.mkdir()
    (folder / "scan.pdf").write_bytes(pdf())
    rows = [{**row, "image": image} for row, image in zip(ROWS, ("scan.pdf#2", "scan.pdf"), strict=True)]
    (folder / "rows.jsonl").write_text(jsonl(rows))
    return [{"path": str(folder / "rows.jsonl"), "format": "vqa"}]


PAGES = {"pages": {"dpi": 36, "first": 3}}


# --- tests -----------------------------------------------------------------------------------------------------------


def test_all_formats_of_text_and_all_kinds_of_files(write, tmp_path, learned):
    sections = [section for section in LOCAL if section not in BOXES]
    sources = {section: write(section) for section in sections}
    sources |= {kind: write_kind(tmp_path / f"kind {number}", kind) for number, kind in enumerate(KINDS)}
    sources["pages"] = write_pages(tmp_path / "pages")
    replies = [told_replies(section) if section in sections else REPLIES for section in sources]
    evaluate = scored(sources["vqa"], {"task": "custom", "metric": "anls"})
    learn(tmp_path, [*chain(*sources.values())], [*chain(*replies)], learned, evaluate, **PAGES)


def test_all_forms_of_boxes_and_layouts(write, tmp_path, learned):
    sources = {section: write(section) for section in BOXES}
    evaluate = scored(sources["COCO"][:1], DETECTION)
    learn(tmp_path, [*chain(*sources.values())], [*chain(*map(told_replies, sources))], learned, evaluate)


@pytest.mark.slow
@pytest.mark.parametrize("section", LOCAL)
def test_each_example(write, tmp_path, learned, section):
    sources = write(section)
    how = SCORED_AS.get(section, {"task": "custom", "metric": "anls"})
    asked = [one for one in sources if section not in BOXES or one["format"] == "grounding"]
    learn(tmp_path, sources, told_replies(section), learned, scored(asked[:1], how))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "pages"])
def test_each_kind_of_file(tmp_path, learned, kind):
    sources = write_pages(tmp_path / "data") if kind == "pages" else write_kind(tmp_path / "kind", kind)
    learn(tmp_path, sources, REPLIES, learned, scored(sources, {"task": "custom", "metric": "anls"}), **PAGES)
