"""finetune/data/README.md: its examples are read as they stand there, its errors are those that a user gets."""

import json
import re
from pathlib import Path

import datasets
import pytest
from data_page import LOCAL, PAGE, SECTIONS, told_samples, write_page_images, write_section

from finetune.data.checks.checking import check_samples
from finetune.data.sample import DataError
from finetune.data.samples import Samples
from finetune.recipe.sources import LAYOUTS, Source
from qwenvl.text.chat import render_chat


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    """An empty folder with the images that the page's examples name."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    write_page_images(tmp_path)
    return tmp_path


def sources_of(section: str) -> list[Source]:
    """The sources of a section, after its files were written and its Python was run."""
    return [Source(**one) for one in write_section(section)]


def shown(messages) -> list[str]:
    """Turns as the page shows them, each on one line: `user: [image] What?`."""
    lines = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = ["[image]" if part["type"] == "image" else part["text"] for part in parts]
        lines.append(f"{message['role']}: {' '.join(text.strip().replace(chr(10), ' ') for text in texts)}")
    return lines


@pytest.mark.parametrize("section", LOCAL)
def test_examples_are_read(section, tiny_processor):
    samples = Samples(sources_of(section))
    found = check_samples(samples, tiny_processor.tokenizer, max_length=2048, n_queries=4, show_progress=False)
    assert found.total == len(found.kept) >= 1
    assert told_samples(section) == [" / ".join(shown(sample.messages)) for sample in samples]
    for sample in samples:
        assert render_chat(sample.messages, tiny_processor.tokenizer, n_queries=4).images


def test_the_hub_example(monkeypatch):
    asked = []
    features = {
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "answers": datasets.List(datasets.Value("string")),
    }
    rows = [{"image": {"bytes": b"x", "path": None}, "question": "Q", "answers": ["A"]}]

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(rows, features=datasets.Features(features))

    class Builder:
        hash = "1"

        def as_streaming_dataset(self, split):
            asked.append(("streamed", split))
            return load_dataset("", None, split).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: Builder())
    samples = Samples(sources_of("Hub"))
    assert [shown(sample.messages) for sample in samples] == [["user: [image] Q Answer:", "assistant: A"]] * 2
    assert asked[0] == ("HuggingFaceM4/DocumentVQA", None, "train") and ("streamed", "train") in asked


def test_every_format_and_kind_of_file_has_an_example():
    sources = [source for section in SECTIONS for source in sources_of(section)]
    formats = {"messages", "qwen_json", "llava", "swift", "texts", "vqa", "grounding", "caption", "fields"}
    assert {source.format for source in sources} == formats
    kinds = {Path(source.path).suffix for source in sources if Path(source.path).is_file()}
    assert kinds == {".json", ".jsonl", ".parquet", ".csv", ".xml"}
    layouts = {source.annotations.layout for source in sources if source.annotations is not None}
    assert layouts == set(LAYOUTS)
    assert any(Path(source.path).is_dir() for source in sources) and any(source.streaming for source in sources)


# --- mistakes --------------------------------------------------------------------------------------------------------

ASKED = {"role": "user", "content": "What is the total?"}
TOLD = {"role": "assistant", "content": "$ 12.40"}


def rows(*given, name="train.jsonl", **source):
    Path("data", name).write_text("".join(json.dumps(row) + "\n" for row in given))
    return {"path": f"data/{name}", "format": "messages", **source}


def text(name, data, **source):
    Path("data", name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return {"path": f"data/{name}", "format": "messages", **source}


VQA = {"image": "receipt.png", "question": "What is the total?", "answers": ["$ 12.40"]}
FOUND = {"image": "photo.jpg", "phrase": "the car", "box": [400, 300, 320, 240]}
EDGE = {**TOLD, "content": "<ref>it</ref><box>(1,2),(3,1000)</box>", "grounding": True}
MARKED = {**TOLD, "content": "<ref>it</ref><box>(1,2),(3,4000)</box>", "grounding": True}

MISTAKES = {
    "image path is wrong": lambda: rows({"messages": [ASKED, TOLD], "images": ["scan.png"]}),
    "image path is another machine's": lambda: rows({"messages": [ASKED, TOLD], "images": ["D:\\scans\\receipt.png"]}),
    "image lies outside the data file's folder": lambda: rows(
        {"messages": [ASKED, TOLD], "images": ["../outside.png"]}
    ),
    "image is a web address": lambda: rows({"messages": [ASKED, TOLD], "images": ["https://host.example/a.png"]}),
    "more images than places": lambda: rows(
        {"messages": [{**ASKED, "content": [{"type": "image"}]}, TOLD], "images": ["receipt.png", "photo.jpg"]}
    ),
    "no reply to learn": lambda: rows({"messages": [ASKED]}),
    "conversation is longer than `max_length`": lambda: rows(
        {"messages": [{**ASKED, "content": "long " * 3000}, TOLD]}
    ),
    "column has another name": lambda: rows({"image": "receipt.png", "query": "?", "answers": "x"}, format="vqa"),
    "answers are hidden, as in public test splits": lambda: rows({**VQA, "answers": [""]}, format="vqa"),
    "an image in a column that the format does not read": lambda: rows(
        {"image": "a.png", "conversations": [{"from": "user", "value": "Hi"}]}, format="qwen_json"
    ),
    "boxes in texts, without `data.grounding`": lambda: rows(
        {"messages": [ASKED, {**TOLD, "content": "<box>(1,2),(3,4)</box>"}]}
    ),
    "LLaVA's roles in format `qwen_json`": lambda: rows(
        {"conversations": [{"from": "human", "value": "Hi"}]}, format="qwen_json"
    ),
    "boxes are xywh, the recipe says xyxy": lambda: rows(FOUND, format="grounding", box_form="xyxy"),
    "a box ends at 1000": lambda: rows({"messages": [{**ASKED, "grounding": True}, EDGE]}),
    "a box's numbers are not in [0, 1000)": lambda: rows({"messages": [ASKED, MARKED]}),
    "a line of JSON Lines is cut off": lambda: text("train.jsonl", '{"messages": [{"role": "user", "con\n'),
    "a comma too many in a JSON file": lambda: text("train.json", '[\n  {"messages": []},\n]'),
    "Python's quotes in a JSON file": lambda: text("train.json", "[{'messages': []}]"),
    "the rows are inside an object": lambda: text("train.json", '{"version": 1, "data": [{"messages": []}]}'),
    "the file is GBK": lambda: text("train.jsonl", '{"question": "红色的是什么？"}\n'.encode("gbk")),
    "a cell is empty": lambda: text("train.csv", "image,question,answers\nreceipt.png,Date?,\n", format="vqa"),
    "a field of a CSV file holds a comma": lambda: text(
        "train.csv", "image,question,answers\nreceipt.png,Date, please?,May\n", format="vqa"
    ),
    "a table of an old Excel": lambda: text("train.xls", b""),
    "`streaming` for a file": lambda: rows({"messages": [ASKED, TOLD]}, streaming=True),
}


def error_of(mistake: str, tokenizer) -> str:
    """What a user gets for it; of an error of rows, the line of the first row."""
    Path("outside.png").touch()
    with pytest.raises(DataError) as caught:
        samples = Samples([Source(**MISTAKES[mistake]())])
        check_samples(samples, tokenizer, max_length=2048, n_queries=256, show_progress=False)
    error = str(caught.value.problems[0] if caught.value.problems else caught.value)
    return error.replace(f"{Path.cwd()}/", "")


def test_errors_are_as_told(tiny_processor):
    told = dict(re.findall(r"^\| (.+?) \| (data/.+) \|$", PAGE, re.MULTILINE))
    assert list(told) == list(MISTAKES)
    for mistake in MISTAKES:
        assert error_of(mistake, tiny_processor.tokenizer) == told[mistake]
