"""Images opened before step 1: what is decoded, what is remembered, and what a header shows."""

import io
import json
import os
import random
import re
import tarfile
import time

import datasets
import pytest
from PIL import Image

from finetune.data.checks import image_check
from finetune.data.checks.checking import look_at
from finetune.data.checks.image_check import open_images, remembered_file, without
from finetune.data.checks.rules import Rules
from finetune.data.samples import Samples
from finetune.recipe import Source
from qwenvl import load_image

SAYS_IT_ALL = 100  # bytes: more than a header, less than the image


def png(shade):
    file = io.BytesIO()
    Image.frombytes("L", (40, 40), random.Random(shade).randbytes(1600)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    remembered_file().unlink(missing_ok=True)
    yield
    remembered_file().unlink(missing_ok=True)


@pytest.fixture
def opening(tiny_processor):
    """Opens the images of a source; returns what was found, and what is left of the rows."""
    rules = Rules(tiny_processor.tokenizer, None, on_bad_row="skip")

    def run(path, mode="all", row_format="caption"):
        samples = Samples([Source(path=str(path), format=row_format)])
        checked = look_at(samples, rules, show_progress=False, processes=1)
        opened = open_images(samples, checked, rules, mode, show_progress=False, processes=1)
        return opened, without(checked, opened)

    return run


def write(folder, *contents):
    """Rows of an image file each; None takes the first file again."""
    lines = []
    for number, content in enumerate(contents):
        name = f"{number if content is not None else 0}.png"
        if content is not None:
            (folder / name).write_bytes(content)
            os.utime(folder / name, (1e9, 1e9))
        lines.append(json.dumps({"image": name, "caption": f"Number {number}."}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder / "rows.jsonl"


def test_cut_images_are_found_by_decoding_and_not_by_headers(tmp_path, opening):
    file = write(tmp_path, png(1), png(2)[:-SAYS_IT_ALL], None, b"no image")
    opened, checked = opening(file)
    assert opened.samples == (1, 3) and opened.opened == 3 and opened.note == "", "each file once"
    assert [str(problem).split(": ")[0] for problem in opened.problems] == [
        f"{file}, row 2, images[0]",
        f"{file}, row 4, images[0]",
    ]
    assert checked.kept.tolist() == [0, 2] and checked.refused == 2 and checked.image_keys.shape == (2,)
    opened, checked = opening(file, "headers")
    assert opened.samples == (3,) and checked.kept.tolist() == [0, 1, 2]
    assert opened.note == "only the headers of images were read (data.check_images: headers)"


@pytest.mark.parametrize(("most", "decodes"), [(600.0, True), (0.05, False)])
def test_auto_decodes_all_where_the_first_predict_less_than_the_most(tmp_path, opening, monkeypatch, most, decodes):
    def load(*args, **kwargs):
        time.sleep(0.0 if decodes else 0.02)
        return load_image(*args, **kwargs)

    monkeypatch.setattr(image_check, "CHUNK", 1)
    monkeypatch.setattr(image_check, "MOST_SECONDS", most)
    monkeypatch.setattr(image_check, "load_image", load)
    cut = png(3)[:-SAYS_IT_ALL]
    opened, _ = opening(write(tmp_path, png(1), cut, *[png(9)] * 8, cut, b"no image"), "auto")
    assert opened.samples == ((1, 10, 11) if decodes else (11,)) and opened.opened == 12
    told = "decoding all 12 images would take .*: 1 were decoded, of the others the headers were read"
    assert re.match("$" if decodes else told, opened.note)


@pytest.fixture
def slow(monkeypatch):
    """As if opening took long enough to be worth remembering."""
    monkeypatch.setattr(image_check, "REMEMBERED_SECONDS", 0.0)


def test_what_could_be_decoded_is_remembered_until_it_changes(tmp_path, opening, slow):
    file = write(tmp_path, png(1), png(2), png(3)[:-SAYS_IT_ALL])
    assert opening(file)[0].opened == 3
    opened, _ = opening(file)
    assert (opened.opened, opened.remembered, opened.samples) == (1, 2, (2,)), "bad ones are opened again"
    # Other content, of the same size and time: the time of the change of the file itself tells.
    (tmp_path / "1.png").write_bytes(png(2)[:-1] + b"x")
    os.utime(tmp_path / "1.png", (1e9, 1e9))
    assert opening(file)[0].remembered == 1
    # Just written: a change within the same tick of the clock could not be told.
    (tmp_path / "0.png").write_bytes(png(1))
    assert [opening(file)[0].remembered for _ in range(2)] == [1, 1]
    remembered_file().write_bytes(b"damaged")
    assert opening(file)[0].remembered == 0


def write_parquet(folder, contents):
    images = [{"bytes": content, "path": None} for content in contents]
    made = datasets.Dataset.from_dict({"image": images, "caption": ["It."] * len(contents)})
    made.cast_column("image", datasets.Image()).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def write_tar(folder, contents):
    with tarfile.open(folder / "rows.tar", "w") as made:
        for number, content in enumerate(contents):
            for ending, inside in (("png", content), ("json", b'{"caption": "It."}')):
                member = tarfile.TarInfo(f"{number:03}.{ending}")
                member.size = len(inside)
                made.addfile(member, io.BytesIO(inside))
    return folder / "rows.tar"


@pytest.mark.parametrize("write", [write_parquet, write_tar])
def test_images_inside_the_data_are_remembered_by_content(tmp_path, opening, slow, write):
    contents = [png(1), png(2), png(3)[:-SAYS_IT_ALL]]
    opened, checked = opening(write(tmp_path, contents))
    assert opened.samples == (2,) and opened.opened == 3 and checked.kept.tolist() == [0, 1]
    assert "row 3, images[0]: cannot be decoded" in str(opened.problems[0])
    opened, _ = opening(write(tmp_path, contents))
    assert (opened.opened, opened.remembered, opened.samples) == (1, 2, (2,))
    # Mended, and another one spoilt in the same place.
    opened, _ = opening(write(tmp_path, [png(1), png(2)[:-SAYS_IT_ALL], png(3)]))
    assert (opened.opened, opened.remembered, opened.samples) == (2, 1, (1,))


def test_a_change_of_a_file_that_was_remembered_is_found(tmp_path, opening, slow):
    file = write(tmp_path, png(1), png(2))
    opening(file)
    assert opening(file)[0].remembered == 2
    (tmp_path / "1.png").write_bytes(png(2)[:-SAYS_IT_ALL])
    opened, _ = opening(file)
    assert opened.samples == (1,) and opened.remembered == 1
    assert time.time() - (tmp_path / "1.png").stat().st_mtime < 60
