"""The quickstart's data: what the script makes is what is in the repository, and all of it can be trained on."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from finetune.data.checking import check_samples
from finetune.data.samples import Samples
from qwenvl.grounding import parse_grounding

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICKSTART = EXAMPLES / "quickstart"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    runpy.run_path(str(EXAMPLES / "make_quickstart_data.py"))["write"](folder)
    return folder


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_script_makes_it_again(made):
    assert files(made) == files(QUICKSTART)
    for name in files(made):
        if name.endswith(".png"):
            ours, theirs = (np.asarray(Image.open(folder / name).convert("RGB")) for folder in (QUICKSTART, made))
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert (QUICKSTART / name).read_bytes() == (made / name).read_bytes()


def test_it_is_small():
    assert sum(path.stat().st_size for path in QUICKSTART.rglob("*")) < 1_200_000


def checked(name, row_format, tokenizer):
    settings = {"columns": {}, "prompt": None, "box_form": None, "config": None, "split": None, "streaming": False}
    source = SimpleNamespace(path=str(QUICKSTART / name), format=row_format, weight=1.0, limit=None, **settings)
    return check_samples(Samples([source]), tokenizer, max_length=1024)


@pytest.mark.parametrize(("name", "rows", "two_images"), [("train.jsonl", 48, 4), ("eval.jsonl", 12, 0)])
def test_every_row_can_be_trained_on(published_tokenizer, name, rows, two_images):
    found = checked(name, "messages", published_tokenizer)
    assert len(found.kept) == found.total == rows
    assert (found.images == 2).sum() == two_images
    assert (found.images == 1).sum() == rows - two_images
    assert found.supervised.min() >= 2


def test_the_chat_form_can_be_trained_on(published_tokenizer):
    assert len(checked("chat.json", "qwen_json", published_tokenizer).kept) == 6


def test_evaluation_asks_about_pages_that_are_not_trained_on():
    pages = {
        name: {image for line in (QUICKSTART / name).read_text().splitlines() for image in json.loads(line)["images"]}
        for name in ("train.jsonl", "eval.jsonl")
    }
    assert not pages["train.jsonl"] & pages["eval.jsonl"]
    contents = {(QUICKSTART / page).read_bytes() for name in pages for page in pages[name]}
    assert len(contents) == len(pages["train.jsonl"]) + len(pages["eval.jsonl"])


def test_boxes_are_around_ink():
    """In each box there is writing, and around it, a few pixels out, is paper (or a ruled line)."""
    for row in json.loads((QUICKSTART / "chat.json").read_text()):
        with Image.open(QUICKSTART / f"images/{row['id']}.png") as image:
            grey = np.asarray(image.convert("L")).astype(int)
        (region,) = parse_grounding(row["conversations"][-1]["value"]).regions
        box = region.to_pixels(grey.shape[1], grey.shape[0])
        x1, y1, x2, y2 = int(box.x1), int(box.y1), int(box.x2) + 1, int(box.y2) + 1
        assert (grey[y1:y2, x1:x2] < 100).mean() > 0.05
        sides = np.concatenate([grey[y1:y2, x1 - 3], grey[y1:y2, x2 + 3]])
        assert sides.min() > 200
