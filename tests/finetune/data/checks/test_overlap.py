"""Rows and images that are trained on and evaluated on: found by content, named, and never by chance."""

import io
import json
import tarfile

import datasets
import pytest
from files_of_pages import pdf
from PIL import Image
from recipes_for_tests import TINY
from said import collect

from finetune.data.checks import checking, overlap
from finetune.data.checks.checking import look_at
from finetune.data.checks.image_check import OpenedImages, without
from finetune.data.checks.overlap import find_overlap
from finetune.data.checks.rules import Rules
from finetune.data.reading import look_for_overlap
from finetune.data.sample import DataError
from finetune.data.samples import Samples
from finetune.recipe import parse_recipe
from finetune.recipe.sources import Source
from finetune.training.train import train as train_run


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    for number in range(8):
        Image.new("RGB", (20, 10), (number, 0, 0)).save(tmp_path / f"{number}.bmp")  # all of one size
    Image.new("RGB", (30, 10), (1, 1, 1)).save(tmp_path / "other.png")
    return tmp_path


def source(path, rows, **settings):
    if path.suffix == ".parquet":
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        columns["image"] = [{"bytes": (path.parent / name).read_bytes(), "path": name} for name in columns["image"]]
        datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path), format="vqa", **settings)


def row(image, question="Q", answers="a"):
    return {"image": image, "question": question, "answers": answers}


def looked_at(given, tokenizer):
    samples = Samples([given])
    rules = Rules(tokenizer, 2048, 4, identify=True)
    return samples, look_at(samples, rules, show_progress=False, processes=1)


def found(train, evals, tokenizer):
    (left, trained), (right, asked) = (looked_at(given, tokenizer) for given in (train, evals))
    return find_overlap(left, trained.kept, trained.identities, right, asked.kept, asked.identities)


KINDS = [(".jsonl", ".jsonl"), (".parquet", ".jsonl"), (".jsonl", ".parquet"), (".parquet", ".parquet")]


@pytest.mark.parametrize(("left", "right"), KINDS)
def test_rows_and_images_are_found_however_they_are_stored(folder, tiny_processor, left, right):
    (folder / "copy.bmp").write_bytes((folder / "2.bmp").read_bytes())
    train = source(folder / f"train{left}", [row("0.bmp"), row("1.bmp", "Q1"), row("2.bmp", "Q2"), row("3.bmp")])
    evals = [row("4.bmp"), row("1.bmp", "Q1"), row("2.bmp", "other"), row("copy.bmp", "Q2"), row("copy.bmp", "Q9")]
    result = found(train, source(folder / f"eval{right}", evals), tiny_processor.tokenizer)
    assert (result.total, result.rows, result.shown, result.not_compared) == (5, 2, 4, 0)
    assert result.lines() == [
        f"2 of 5 evaluation rows are training rows too, such as {folder}/eval{right}, row 2 "
        f"({folder}/train{left}, row 2)",
        f"4 of 5 evaluation rows show an image that is trained on, such as {folder}/eval{right}, row 3 "
        f"({folder}/train{left}, row 3)",
        "their scores tell what was learned by heart: data.split: {eval: 0.1} cuts by image",
    ]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_what_only_looks_alike_is_not_found(folder, tiny_processor, kind):
    """The same words on other images of the same size."""
    train = source(folder / f"train{kind}", [row(f"{number}.bmp") for number in range(4)])
    evals = source(folder / f"eval{kind}", [row(f"{number}.bmp") for number in range(4, 8)] + [row("other.png")])
    assert found(train, evals, tiny_processor.tokenizer).lines() == []


def test_the_same_file_for_both(folder, tiny_processor):
    rows = [row(f"{number}.bmp", f"Q{number}") for number in range(8)]
    given = source(folder / "a.jsonl", rows)
    result = found(given, given, tiny_processor.tokenizer)
    assert (result.total, result.rows, result.shown) == (8, 8, 8)
    assert len(result.lines()) == 2


def test_it_does_not_depend_on_what_is_checked_at_once(folder, tiny_processor, monkeypatch):
    train = source(folder / "train.jsonl", [row(f"{n % 8}.bmp", f"Q{n}") for n in range(25)])
    evals = source(folder / "eval.jsonl", [row(f"{n % 8}.bmp", f"Q{n}") for n in range(20, 30)])
    at_once = found(train, evals, tiny_processor.tokenizer)
    monkeypatch.setattr(checking, "CHUNK", 2)
    assert found(train, evals, tiny_processor.tokenizer) == at_once
    assert (at_once.rows, at_once.shown) == (5, 10)


def test_little_is_read(folder, tiny_processor, monkeypatch):
    """Only images of equal sizes are read, each once, and no more than the bound; none where all are shared."""
    read = []
    monkeypatch.setattr(overlap, "read_encoded", lambda image, access: read.append(image) or image.encode())
    train = source(folder / "train.jsonl", [row("other.png"), row("0.bmp"), row("0.bmp", "Q2"), row("1.bmp")])
    evals = source(folder / "eval.jsonl", [row("0.bmp"), row("2.bmp"), row("2.bmp", "Q2")])
    result = found(train, evals, tiny_processor.tokenizer)
    assert sorted(path.rsplit("/")[-1] for path in read) == ["0.bmp", "1.bmp", "2.bmp"]
    assert (result.rows, result.shown) == (1, 1)
    read.clear()
    assert found(train, train, tiny_processor.tokenizer).rows == 4 and not read
    monkeypatch.setattr(overlap, "MOST_BYTES", 10)
    limited = found(train, evals, tiny_processor.tokenizer)
    assert (limited.rows, limited.not_compared) == (1, 6)
    assert limited.lines()[-1] == "6 images of equal sizes were not read to compare them"


def test_a_recipe_can_ask_for_an_error(folder, tiny_processor):
    given = source(folder / "a.jsonl", [row("0.bmp")])
    part = {"train": looked_at(given, tiny_processor.tokenizer), "eval": looked_at(given, tiny_processor.tokenizer)}
    text = "model: {path: x}\noutput: y\ndata: {train: {path: a, format: vqa}}\n"
    evaluate = "evaluate: {data: {path: a, format: vqa}, overlap: %s}"
    assert "1 of 1 evaluation row" in look_for_overlap(parse_recipe(text + evaluate % "warn"), part)[0]
    with pytest.raises(DataError, match=r"1 of 1 evaluation row is a training row too"):
        look_for_overlap(parse_recipe(text + evaluate % "error"), part)
    assert look_for_overlap(parse_recipe(text), part) == []


def test_what_is_left_out_later_is_not_compared(folder, tiny_processor):
    rows = [row("0.bmp"), row("1.bmp"), row("2.bmp", "Q2")]
    samples, checked = looked_at(source(folder / "train.jsonl", rows), tiny_processor.tokenizer)
    opened = OpenedImages(3, 1.0, [], samples=(1,))
    left = without(checked, opened)
    _, alone = looked_at(source(folder / "less.jsonl", [rows[0], rows[2]]), tiny_processor.tokenizer)
    assert left.kept.tolist() == [0, 2] and left.identities == alone.identities
    evals, asked = looked_at(source(folder / "eval.jsonl", [row("1.bmp"), rows[2]]), tiny_processor.tokenizer)
    shared = find_overlap(samples, left.kept, left.identities, evals, asked.kept, asked.identities)
    assert (shared.rows, shared.shown) == (1, 1)


def test_pages_of_one_file_are_different_images(folder, tiny_processor):
    (folder / "a.pdf").write_bytes(pdf())
    train = source(folder / "train.jsonl", [row("a.pdf#1", "Q1"), row("a.pdf#2", "Q2")])
    (folder / "b.pdf").write_bytes(pdf())
    evals = source(folder / "eval.jsonl", [row("a.pdf#3", "Q3"), row("b.pdf#2", "Q4")])
    assert found(train, evals, tiny_processor.tokenizer).shown == 1


def test_an_image_in_a_tar_and_in_a_file(folder, tiny_processor):
    with tarfile.open(folder / "rows.tar", "w") as made:
        for name in ("1.bmp", "2.bmp"):
            key = name.partition(".")[0]
            told = json.dumps({"question": f"Q{key}", "answers": "a"}).encode()
            for ending, content in (("bmp", (folder / name).read_bytes()), ("json", told)):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                made.addfile(member, io.BytesIO(content))
    (folder / "copy.bmp").write_bytes((folder / "1.bmp").read_bytes())
    evals = source(folder / "eval.jsonl", [row("copy.bmp", "Q1"), row("2.bmp", "other"), row("3.bmp")])
    result = found(Source(path=str(folder / "rows.tar"), format="vqa"), evals, tiny_processor.tokenizer)
    assert (result.total, result.rows, result.shown) == (3, 1, 2)


def test_an_error_of_overlap_stops_the_run(folder, tiny_processor):
    """The same image under another name, in a row with other words."""
    (folder / "copy.bmp").write_bytes((folder / "1.bmp").read_bytes())
    train, evals = source(folder / "a.jsonl", [row("1.bmp")]), source(folder / "b.jsonl", [row("copy.bmp", "R")])
    text = f"""
model: {{path: {TINY}, dtype: float32}}
output: {folder / "run"}
data: {{train: {{path: {train.path}, format: vqa}}}}
evaluate: {{data: {{path: {evals.path}, format: vqa}}, overlap: %s}}
"""
    with pytest.raises(DataError, match=r"1 of 1 evaluation rows show an image that is trained on.*b.jsonl, row 1"):
        train_run(parse_recipe(text % "error"), say=collect([]))
    assert not (folder / "run" / "run.json").exists()
