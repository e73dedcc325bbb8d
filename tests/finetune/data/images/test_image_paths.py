"""Paths as other systems write them: followed where one file inside the root is meant, else a hint."""

import json
import os
import unicodedata

import pytest
from PIL import Image

from finetune.data.checks.checking import look_at
from finetune.data.checks.rules import Rules
from finetune.data.images.image_files import check_image
from finetune.data.images.image_paths import hint, meant_path
from finetune.data.samples import Samples
from finetune.errors import UserError
from finetune.recipe.sources import Source
from qwenvl import ImageAccess, load_image

FILES = ["scans/deep/x.jpeg", "a b (1).png", "50% off.png", "50%25 off.png", "ä.png", "図/1.png"]


@pytest.fixture
def root(tmp_path):
    for name in FILES:
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10)).save(tmp_path / "root" / name)
    Image.new("RGB", (20, 10)).save(tmp_path / "secret.png")
    return tmp_path / "root"


@pytest.mark.parametrize("name", FILES)
def test_what_is_there_is_what_is_meant(root, name):
    assert meant_path(name, root) == f"{root}/{name}"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("scans\\deep\\x.jpeg", "scans/deep/x.jpeg"),
        (".\\scans\\deep\\x.jpeg", "./scans/deep/x.jpeg"),
        ("a%20b%20(1).png", "a b (1).png"),
        ("50%25%20off.png", "50% off.png"),
        ("%E5%9B%B3/1.png", "図/1.png"),
        ("scans%5Cdeep%5Cx.jpeg", "scans/deep/x.jpeg"),
        ("scans\\deep\\x.jpeg#1", "scans/deep/x.jpeg#1"),
        ("file:ROOT/scans/deep/x.jpeg", "scans/deep/x.jpeg"),
        ("file://ROOT/scans/deep/x.jpeg", "scans/deep/x.jpeg"),
        ("FILE://localhostROOT/a%20b%20(1).png", "a b (1).png"),
    ],
)
def test_paths_of_other_systems(root, written, meant):
    found = meant_path(written.replace("ROOT", str(root)), root)
    assert os.path.realpath(found) == str(root / meant)
    check_image(found, ImageAccess(root=root))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("D:\\data\\img\\x.jpeg", None),
        ("D:\\data\\scans\\deep\\x.jpeg", "scans/deep/x.jpeg"),
        ("C:/data/deep/a b (1).png", "a b (1).png"),
        ("file:///data/old/scans/deep/x.jpeg", "scans/deep/x.jpeg"),
        ("/data/old/scans/deep/x.jpeg", "scans/deep/x.jpeg"),
        ("Scans/DEEP/X.jpeg", "scans/deep/x.jpeg"),
        (unicodedata.normalize("NFD", "ä.png"), "ä.png"),
        ("scans/deep/y.jpeg", None),
        ("", None),
    ],
)
def test_what_is_not_clear_is_a_hint(root, written, meant):
    assert (f"is {meant!r} meant?" in hint(written, root)) if meant else not hint(written, root)
    if written:
        with pytest.raises(UserError) as caught:
            check_image(meant_path(written, root), ImageAccess(root=root))
        assert (f"is {meant!r} meant? That is in {root}" in str(caught.value)) == (meant is not None)


@pytest.mark.parametrize(
    "written",
    [
        "%2e%2e/secret.png",
        "..\\secret.png",
        "%2e%2e%5Csecret.png",
        "file://ROOT/../secret.png",
        "file://host/secret.png",
        "\\\\host\\share\\secret.png",
        "link%2Epng",
        "%00.png",
        "%ff.png",
        "%252e%252e/secret.png",
        "file:",
        "file://[",
    ],
)
def test_no_way_leads_out_of_the_root(root, written):
    (root / "link.png").symlink_to(root.parent / "secret.png")
    written = written.replace("ROOT", str(root))
    for opened in (check_image, load_image):
        access = ImageAccess(root=root)
        with pytest.raises(ValueError):
            opened(meant_path(written, root), access) if opened is check_image else load_image(
                meant_path(written, root), access=access
            )
    assert "secret" not in hint(written, root)


def test_rows_are_read_and_refused(root, tiny_processor):
    names = ["scans\\deep\\x.jpeg", "a%20b%20(1).png", "Scans/deep/x.jpeg", "%2e%2e/secret.png"]
    rows = [{"image": name, "question": "What?", "answers": "ok"} for name in names]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = Samples([Source(path=str(root / "rows.jsonl"), format="vqa")])
    found = look_at(samples, Rules(tiny_processor.tokenizer, 2048, 4), show_progress=False)
    assert found.kept.tolist() == [0, 1]
    assert [load_image(s.messages[0]["content"][0]["image"], access=s.access).size for s in (samples[0], samples[1])]
    assert "is 'scans/deep/x.jpeg' meant?" in str(found.problems[0]) and "meant" not in str(found.problems[1])
