"""Files of several pages in data: as several images, by page, or refused, in every place that reads them."""

import io
import json
import os

import datasets
import numpy as np
import pytest
from files_of_pages import BLUE, COLOURS, GREEN, encrypted_pdf, frames, pdf
from PIL import Image
from questions_for_tests import ask

from finetune.batches.image_request import image_key
from finetune.data.checks.image_check import _stamp
from finetune.data.images.image_files import check_image, count_pages, file_size, read_encoded, upright_size
from finetune.data.images.pages import Pages
from finetune.data.prepared_rows import make_row
from finetune.data.sample import BadRow
from finetune.data.samples import Samples
from finetune.data.shown_rows import document_of
from finetune.errors import UserError
from finetune.recipe import Source
from finetune.vision_cache.cache import ImageHandles
from qwenvl import ImageAccess, load_image
from qwenvl.text.chat_string import write_chat

TWO = Pages(dpi=72, first=2, on_more="drop")
ALL = Pages(dpi=72, first=3)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "file.pdf").write_bytes(pdf())
    (tmp_path / "scan.tif").write_bytes(frames())
    (tmp_path / "one.pdf").write_bytes(pdf([GREEN]))
    (tmp_path / "locked.pdf").write_bytes(encrypted_pdf())
    Image.new("RGB", (8, 4), "teal").save(tmp_path / "a.png")
    return tmp_path


def samples(folder, *rows, row_format="vqa", pages=None, **given):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(path=str(folder / "rows.jsonl"), format=row_format)
    return Samples([source], pages=pages, **given)


def row(image):
    return {"image": image, "question": "Q", "answers": "A"}


def images(sample):
    return [part["image"] for part in sample.messages[0]["content"] if part["type"] == "image"]


def colour(source, access=None):
    return load_image(source, access=access or ImageAccess()).getpixel((0, 0))


def test_a_file_becomes_the_images_of_its_pages(folder):
    read = samples(folder, row("file.pdf"), row("scan.tif"), row("a.png"), row("file.pdf#3"), pages=ALL)
    expected = [[f"file.pdf#{n}" for n in (1, 2, 3)], [f"scan.tif#{n}" for n in (1, 2, 3)], ["a.png"], ["file.pdf#3"]]
    for sample, names in zip(read, expected, strict=True):
        assert images(sample) == [str(folder / name) for name in names] and sample.pages_left_out == 0
    assert [colour(source, read[0].access) for source in images(read[0])] == COLOURS
    assert load_image(images(read[0])[0], access=read[0].access).size == (72, 36)


def test_more_pages_than_asked_for_are_refused_or_counted(folder):
    with pytest.raises(BadRow, match=r"row 1, images\[0\]: has 3 pages, more than data.pages.first=2: raise it"):
        samples(folder, row("file.pdf"), pages=Pages(72, 2))[0]
    sample = samples(folder, row("file.pdf"), pages=TWO)[0]
    assert len(images(sample)) == 2 and sample.pages_left_out == 1


def test_the_one_page_that_is_left_of_a_file_is_named(folder):
    one = Pages(dpi=72, first=1, on_more="drop")
    for row_format, given in [("vqa", row("file.pdf")), ("messages", {"prompt": "Q", "completion": "A"})]:
        given = given if row_format == "vqa" else {**given, "images": ["file.pdf"]}
        [sample] = samples(folder, given, row_format=row_format, pages=one)
        assert images(sample) == [f"{folder / 'file.pdf'}#1"] and sample.pages_left_out == 2


def test_what_cannot_be_read_is_named_with_its_row(folder):
    read = samples(folder, row("locked.pdf"), row("none.pdf"), pages=ALL)
    outcomes = list(read.scan(0, 2))
    assert "row 1, images[0]" in str(outcomes[0]) and "it is an encrypted PDF" in str(outcomes[0])
    assert "there is no file" in str(outcomes[1])


def test_a_row_that_numbers_its_pictures_gets_the_numbers_of_its_pages(folder):
    def numbered(*names, ask="Q"):
        shown = "".join(f"Picture {number}: <img>{name}</img>\n" for number, name in enumerate(names, 1))
        return {"conversations": [{"from": "user", "value": shown + ask}, {"from": "assistant", "value": "A"}]}

    rows = [
        numbered("file.pdf#2", "a.png", ask="Is Picture 2 blue?"),
        numbered("a.png", "file.pdf", "a.png", ask="Is Picture 2 blue?"),
        numbered("file.pdf", "a.png", ask="Is Picture 2 blue?"),
    ]
    read = samples(folder, *rows, row_format="qwen_json", pages=ALL)
    assert images(read[0]) == [str(folder / "file.pdf#2"), str(folder / "a.png")] and read[0].more_pages == 0
    written = write_chat(read[1].messages)
    assert "".join(f"Picture {number}: <img></img>\n" for number in (1, 2, 3, 4, 5)) + "Is" in written
    assert images(read[1])[1:4] == [str(folder / f"file.pdf#{n}") for n in (1, 2, 3)] and read[1].more_pages == 2
    with pytest.raises(BadRow, match=r"row 3, messages\[0\]: says 'Picture 2', and image 2 is another .* data.pages"):
        read[2]


def test_images_inside_rows(folder, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": frames(), "path": "x.tif"}], "question": ["Q"], "answers": ["A"]},
        features=datasets.Features(
            {"image": datasets.Image(), "question": datasets.Value("string"), "answers": datasets.Value("string")}
        ),
    )
    data.to_parquet(folder / "rows.parquet")
    source = Source(path=str(folder / "rows.parquet"), format="vqa")
    read = Samples([source], pages=ALL)
    for sample in (read[0], next(iter(read.scan(0, 1)))):
        assert [colour(image) for image in images(sample)] == COLOURS
    assert [colour(image["bytes"]) for image in make_row(read[0], None)["images"]] == COLOURS


def test_without_the_key_a_file_of_several_pages_is_refused(folder):
    access = ImageAccess(root=folder)
    for name in ("file.pdf", "scan.tif"):
        with pytest.raises(UserError, match=rf"'{name}': it has 3 pages and one must be named"):
            check_image(name, access)
        check_image(f"{name}#3", access)
        with pytest.raises(UserError, match="page 4 is asked for, and it has 3 pages"):
            check_image(f"{name}#4", access)
    check_image("one.pdf", access)
    with pytest.raises(UserError, match=r"there is no file 'none\.pdf'"):
        check_image("none.pdf#1", access)
    (folder / "inside").mkdir()
    with pytest.raises(UserError, match="lies outside"):
        check_image("../file.pdf#1", ImageAccess(root=folder / "inside"))


def test_pages_are_counted_sized_and_encoded(folder):
    access = ImageAccess(root=folder, dpi=144)
    assert count_pages("file.pdf", access) == 3 and count_pages(frames("GIF"), access) == 3
    assert count_pages("a.png", access) == 1
    assert upright_size("file.pdf#2", access) == (144, 72) and upright_size("scan.tif#2", access) == (20, 10)
    for name in ("file.pdf#2", "scan.tif#2"):
        encoded = read_encoded(name, access)
        assert Image.open(io.BytesIO(encoded)).format == "PNG"
        np.testing.assert_array_equal(load_image(encoded), load_image(name, access=access))
    assert file_size(str(folder / "file.pdf#2")) == len(pdf()) and file_size(str(folder / "none.pdf#2")) == -1


def test_keys_tell_pages_and_resolutions_apart(folder):
    access = ImageAccess(root=folder)
    handles = ImageHandles("", "")
    inside = {"bytes": frames(), "path": None}
    sources = ["file.pdf#1", "file.pdf#2", "scan.tif#1", {**inside, "page": 1}, {**inside, "page": 2}]
    for key in (image_key, handles.of):
        keys = [key(source, one) for source in sources for one in (access, ImageAccess(root=folder, dpi=72))]
        assert len(set(keys)) == len(keys)
    assert len({document_of([source]) for source in sources}) == len(sources)
    before = handles.of("file.pdf#1", access)
    (folder / "file.pdf").write_bytes(pdf([BLUE]))
    assert handles.of("file.pdf#1", access) != before


def test_the_fingerprint_of_the_data_has_the_pages(folder):
    rows = [row("a.png")]
    prints = {samples(folder, *rows, pages=pages).fingerprint() for pages in (None, ALL, TWO, Pages(150, 3))}
    assert len(prints) == 4


def test_questions_show_the_pages(folder):
    question = ask(folder, "docvqa", {"image": "file.pdf", "question": "Q", "answers": ["A"]}, pages=ALL)[0]
    assert [colour(source, question.access) for source in question.images] == COLOURS
    assert [part["type"] for part in question.messages[0]["content"]] == ["image"] * 3 + ["text"]
    dropped = ask(folder, "docvqa", {"image": "file.pdf", "question": "Q", "answers": ["A"]}, pages=TWO)
    assert len(dropped[0].images) == 2 and dropped.pages_left_out == 1
    with pytest.raises(UserError, match="it has 3 pages and one must be named"):
        ask(folder, "docvqa", {"image": "file.pdf", "question": "Q", "answers": ["A"]})
    assert len(ask(folder, "docvqa", {"image": "file.pdf#2", "question": "Q", "answers": ["A"]})[0].images) == 1


def test_examples_of_the_same_document_are_not_shown(folder):
    rows = [{"image": f"file.pdf#{n}", "question": f"Q{n}", "answers": ["A"]} for n in (1, 2)]
    rows.append({"image": "one.pdf", "question": "Q3", "answers": ["A"]})
    questions = ask(folder, "docvqa", *rows, style="base", shots=1)
    assert [shot.text for shot in questions[0].shots] == ["Q3"]


def test_pages_are_remembered_apart(folder):
    os.utime(folder / "file.pdf", (1, 1))
    inside = [{"bytes": pdf(), "path": None, "page": page} for page in (1, 2)]
    stamps = [_stamp(source, ImageAccess(root=folder)) for source in ("file.pdf#1", "file.pdf#2", *inside)]
    assert len(set(stamps)) == 4 and None not in stamps
    assert _stamp("file.pdf#1", ImageAccess(root=folder, dpi=72)) not in stamps
