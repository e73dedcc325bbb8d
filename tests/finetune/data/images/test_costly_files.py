"""Images that would take minutes or all memory to read are refused by rule: where rows are checked, where images are,
and where a batch is made. No decoder sees them."""

import io
import json
import struct
import zlib

import pytest
from files_of_pages import gif_of_frames, pdf_of_calls, tiff_of_directories, webp_of_frames
from PIL import Image

from finetune.batches.collate import LEFT_OUT, Collator
from finetune.data.checks.checking import look_at
from finetune.data.checks.image_check import open_images
from finetune.data.checks.rules import Rules
from finetune.data.samples import Samples
from finetune.recipe.sources import Source
from qwenvl.images import image_decoding, pdf_process

TAGS = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 1)]
ROW = {"question": "What?", "answers": "This."}


def jpeg() -> bytes:
    """A progressive JPEG whose last scan comes 200 times."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(file, "JPEG", progressive=True)
    data = file.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 200 + data[-2:]


def png() -> bytes:
    """A PNG of one pixel whose data inflate to 200 MB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(200_000_000))) + chunk(b"IEND", b"")


def wide(gif: bytes) -> bytes:
    """The animation on a screen of 4096 x 4096."""
    return gif[:6] + struct.pack("<HH", 4096, 4096) + gif[10:]


FILES = {
    "scans.jpg": (jpeg, "a JPEG of 101 scans or more"),
    "inflates.png": (png, "are more than its pixels take without compression"),
    "comments.ppm": (lambda: b"P6\n" + b"#\n" * 600_000 + b"1 1\n255\n\0\0\0", "its header is longer than"),
    "frames.gif": (lambda: gif_of_frames(20_000), "it has more than 10,000 frames"),
    "frames.gif#9": (lambda: gif_of_frames(20_000), "it has more than 10,000 frames"),
    "frames.webp": (lambda: webp_of_frames(20_000), "it has more than 10,000 frames"),
    "frames.webp#9": (lambda: webp_of_frames(20_000), "it has more than 10,000 frames"),
    "far.gif#9000": (
        lambda: gif_of_frames(9000)[:6] + b"\x00\x10\x00\x10" + gif_of_frames(9000)[10:],
        "after more than",
    ),
    "pages.tif": (lambda: tiff_of_directories(20_000, TAGS), "it has more than 10,000 pages"),
    "pages.tif#3": (lambda: tiff_of_directories(20_000, TAGS), "it has more than 10,000 pages"),
    "tags.tif#9": (lambda: tiff_of_directories(20, TAGS + [(40_000 + n, 3, 1, 0) for n in range(9000)]), "tags"),
    "refers.tif#90": (lambda: tiff_of_directories(90, [*TAGS, (40_000, 1, 100_000, 8)]), "refer to far more bytes"),
    "calls.pdf": (lambda: pdf_of_calls(9, 10), "drawing page 1 takes more than"),
}
"""File, with the page that is asked for -> what is in it, and why it is refused."""


@pytest.mark.parametrize("name", FILES)
def test_each_is_named_with_its_row_wherever_images_are_read(tmp_path, tiny_processor, monkeypatch, name):
    make, reason = FILES[name]
    (tmp_path / name.split("#")[0]).write_bytes(make())
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    rows = [{**ROW, "image": "good.png"}, {**ROW, "image": name}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(pdf_process, "MEMORY", 200_000_000)

    for _, _, decoder in image_decoding._DECODERS:

        def load(self, load=decoder.load):
            assert self.size == (8, 8), "a decoder was called"
            return load(self)

        monkeypatch.setattr(decoder, "load", load)

    samples = Samples([Source(path=str(tmp_path / "rows.jsonl"), format="vqa")])
    rules = Rules(tiny_processor.tokenizer, 2048, on_bad_row="skip")
    checked = look_at(samples, rules, show_progress=False)
    opened = open_images(samples, checked, rules, show_progress=False)
    [problem] = [*checked.problems, *opened.problems]
    assert problem.origin.row == 2 and problem.field == "images[0]" and reason in problem.reason, problem
    # In training, where it was not met before.
    batch = Collator(samples, rules, tiny_processor.image_processor)([{"sample": 0}, {"sample": 1}])
    [(index, origin, why)] = batch[LEFT_OUT]
    assert index == 1 and "row 2" in origin and reason in why and batch["samples"].tolist() == [0, -1]


def test_a_row_of_very_many_images_is_refused_before_one_is_opened(tmp_path, tiny_processor, monkeypatch):
    row = {"images": ["a.png"] * 100_000, "messages": [{"role": "user", "content": "x"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr("finetune.data.checks.problems.check_image", lambda *_: pytest.fail("an image was looked at"))
    samples = Samples([Source(path=str(tmp_path / "rows.jsonl"), format="messages")])
    found = look_at(samples, Rules(tiny_processor.tokenizer, 2048, on_bad_row="skip"), show_progress=False)
    [problem] = found.problems
    assert problem.field == "images" and "there are 100,000 in one row" in problem.reason
