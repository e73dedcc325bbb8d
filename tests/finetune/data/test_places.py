"""Rows of a run that goes on: found again after others were taken out, and any other change is refused."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from finetune.data.checks.checking import look_at
from finetune.data.checks.rules import Rules
from finetune.data.places import Gone, align, as_they_were, load_places, places_of, save_places
from finetune.data.samples import Samples
from finetune.errors import UserError
from finetune.recipe import Source
from finetune.recipe.sources import Part


def chat(number, image=None):
    turns = [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": f"Answer {number}"}]
    return {"messages": turns, **({} if image is None else {"images": [image]})}


BAD = {"messages": []}


class Data:
    """Sources of rows, and the places of their samples."""

    def __init__(self, folder, processor):
        self.folder, self.rules = folder, Rules(processor.tokenizer, None, on_bad_row="skip")

    def read(self, *sources, row_format="messages", **settings):
        found = []
        for number, rows in enumerate(sources):
            (self.folder / f"{number}").mkdir(exist_ok=True)
            file = self.folder / f"{number}" / "rows.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            found.append(Source(path=str(file), format=row_format, **settings))
        return self.placed(*found)

    def placed(self, *sources):
        samples = Samples(sources)
        checked = look_at(samples, self.rules, show_progress=False, processes=1)
        return samples, checked, places_of(samples, checked, samples.fingerprint())


@pytest.fixture
def data(tmp_path, tiny_processor):
    for number in range(2):
        (tmp_path / f"{number}").mkdir()
        for name in "abc":
            Image.new("RGB", (8, 8), (40 * number, 0, ord(name))).save(tmp_path / f"{number}" / f"{name}.png")
    return Data(tmp_path, tiny_processor)


def questions(samples):
    return [sample.messages[0]["content"] for sample in samples]


ROWS = [chat(number) for number in range(6)]


@pytest.mark.parametrize(
    ("after", "left_out", "now_of", "gone", "mended", "changes"),
    [
        # Taken out: at the front, within, at the end, several.
        (ROWS[1:], (), [-1, 0, 1, 2, 3, 4], 1, [], []),
        (ROWS[:2] + ROWS[3:], (), [0, 1, -1, 2, 3, 4], 1, [], []),
        (ROWS[:5], (), [0, 1, 2, 3, 4, -1], 1, [], []),
        ([ROWS[1], ROWS[4]], (), [-1, 0, -1, -1, 1, -1], 4, [], []),
        # Spoilt where it is: its place stays empty.
        ([*ROWS[:2], BAD, *ROWS[3:]], (), [0, 1, -1, 3, 4, 5], 1, [], []),
        # Mended after it was left out, alone and beside one that was taken out.
        ([*ROWS[:2], chat("mended"), *ROWS[3:]], (2,), [0, 1, 2, 3, 4, 5], 0, [2], []),
        ([ROWS[0], chat("mended"), *ROWS[3:]], (1, 2), [0, 1, -1, 2, 3, 4], 1, [1], []),
        # Anything else.
        ([*ROWS[:2], chat("other"), *ROWS[3:]], (), None, 0, [], ["row 3 is not the row that it was"]),
        ([*ROWS, chat("more")], (), None, 0, [], ["row 7 was not there"]),
        ([*ROWS[:2], chat("more"), *ROWS[2:]], (), None, 0, [], ["row 3 was not there"]),
        ([*ROWS[:3], ROWS[4], ROWS[3], ROWS[5]], (), None, None, [], ["was"]),
        (ROWS[::-1], (), None, None, [], ["was", "was", "was", "was", "was"]),
    ],
)
def test_rows_are_found_again(data, after, left_out, now_of, gone, mended, changes):
    *_, then = data.read(ROWS)
    samples, checked, now = data.read(after)
    found = align(then, now, samples, left_out)
    assert [said in change for said, change in zip(changes, found.changes, strict=False)] == [True] * len(changes)
    assert bool(found.changes) == bool(changes) and found.mended == mended
    assert gone is None or found.gone == gone
    if now_of is not None:
        assert found.now_of.tolist() == now_of
        placed, as_before = as_they_were(samples, checked, then, found)
        assert as_before.kept.tolist() == list(range(6)) and len(placed) == 6
        for number, place in enumerate(now_of):
            if place < 0:
                with pytest.raises(Gone):
                    placed[number]
            else:
                assert placed[number].messages == samples[place].messages
        assert [type(one) is Gone for one in placed.scan(0, 6)] == [place < 0 for place in now_of]


def test_what_was_bad_when_the_run_began_stays_out(data):
    *_, then = data.read([*ROWS[:3], BAD, *ROWS[4:]])
    samples, checked, now = data.read(ROWS)
    found = align(then, now, samples, ())
    assert (found.changes, found.gone, found.mended, found.waiting) == ([], 0, [], 1)
    assert list(found.notes("train")) == [
        "1 row of the train data left out when the run began is usable now: it stays out"
    ]
    _, as_before = as_they_were(samples, checked, then, found)
    assert as_before.kept.tolist() == [0, 1, 2, 4, 5]
    # Taken out, or another bad one: nothing has changed for the run.
    for rows in ([*ROWS[:3], *ROWS[4:]], [*ROWS[:3], {"messages": [1]}, *ROWS[4:]]):
        samples, _, now = data.read(rows)
        found = align(then, now, samples, ())
        assert (found.changes, found.gone, found.mended, found.waiting) == ([], 0, [], 0)


def test_rows_that_read_the_same(data):
    """Which of two equal rows was taken out makes no difference."""
    *_, then = data.read([ROWS[0], ROWS[1], ROWS[1], ROWS[1], ROWS[2]])
    samples, _, now = data.read([ROWS[0], ROWS[1], ROWS[1], ROWS[2]])
    found = align(then, now, samples, ())
    assert found.changes == [] and found.gone == 1
    assert found.now_of[0] == 0 and found.now_of[4] == 3 and sorted(found.now_of[1:4].tolist()) == [-1, 1, 2]


def test_each_source_is_by_itself(data):
    """Rows of two folders that read the same have other images."""
    first, second = [chat(1, "a.png"), chat(2, "b.png")], [chat(2, "b.png"), chat(3, "c.png")]
    *_, then = data.read(first, second)
    samples, checked, now = data.read(first[:1], second)
    found = align(then, now, samples, ())
    assert found.changes == [] and found.now_of.tolist() == [0, -1, 1, 2]
    placed, as_before = as_they_were(samples, checked, then, found)
    assert [part.stop for part in placed.ranges] == [2, 4] and as_before.source.tolist() == [0, 0, 1, 1]
    assert as_before.lengths[1] == 1 and as_before.images.tolist() == [1, 0, 1, 1]
    assert placed[2].messages[0]["content"][0]["image"].endswith("1/b.png")
    samples, _, now = data.read(first)
    assert align(then, now, samples, ()).changes == ["it has 1 sources, and had 2"]


def test_a_source_with_a_limit(data):
    """A row that is taken out brings in the first one beyond the limit, which was not drawn from."""
    *_, then = data.read(ROWS, limit=4)
    samples, _, now = data.read(ROWS[:1] + ROWS[2:], limit=4)
    (change,) = align(then, now, samples, ()).changes
    assert change.endswith("rows.jsonl, row 4 was not there, or not at this place")
    # Within the limit, and where the row is mended, it goes on.
    samples, _, now = data.read([ROWS[0], chat("mended"), *ROWS[2:]], limit=4)
    assert align(then, now, samples, (1,)).mended == [1]
    samples, _, now = data.read(ROWS[:5], limit=4)
    assert align(then, now, samples, ()).now_of.tolist() == [0, 1, 2, 3]


def test_a_part_of_a_source(data):
    """Which documents are cut off does not depend on the other rows."""
    part = Part(eval=0.3, take="train", by="doc")
    rows = [{**chat(number), "doc": f"d{number}"} for number in range(20)]
    before, _, then = data.read(rows, part=part)
    kept = [one.origin.row for one in before]
    assert 5 < len(kept) < 20
    after = [row for number, row in enumerate(rows, start=1) if number != kept[2]]
    samples, _, now = data.read(after, part=part)
    found = align(then, now, samples, ())
    assert found.changes == [] and found.gone == 1
    assert found.now_of.tolist() == [0, 1, -1, *range(2, len(kept) - 1)]


def test_rows_of_several_samples(data):
    def row(name, *asked):
        return {"image": f"{name}.png", "question": [*asked], "answers": [[f"to {one}"] for one in asked]}

    rows = [row("a", "1", "2"), row("b", "3"), row("c", "4", "5", "6")]
    *_, then = data.read(rows, row_format="vqa")
    samples, _, now = data.read(rows[1:], row_format="vqa")
    found = align(then, now, samples, ())
    assert found.changes == [] and found.gone == 2 and found.now_of.tolist() == [-1, -1, 0, 1, 2, 3]
    # One question of three is gone, and one is another.
    samples, _, now = data.read([*rows[:2], row("c", "4", "6")], row_format="vqa")
    assert align(then, now, samples, ()).now_of.tolist() == [0, 1, 2, 3, -1, 4]
    samples, _, now = data.read([*rows[:2], row("c", "4", "other", "6")], row_format="vqa")
    assert "row 3 is not the row" in align(then, now, samples, ()).changes[0]
    found = align(then, now, samples, (4,))
    assert found.changes == [] and found.mended == [4]


def test_an_image_file_that_is_another(data):
    rows = [chat(1, "a.png"), chat(2, "b.png")]
    *_, then = data.read(rows)
    (data.folder / "0" / "b.png").write_bytes(b"another")
    samples, _, now = data.read(rows)
    assert "row 2 has another image file than it had" in align(then, now, samples, ()).changes[0]
    found = align(then, now, samples, (1,))
    assert found.changes == [] and found.mended == [1]


def picture(shade, size=8):
    file = io.BytesIO()
    Image.new("RGB", (size, size), (shade, 0, 0)).save(file, "BMP")  # a size in bytes that shows in the file
    return file.getvalue()


def write_parquet(folder, rows):
    images = [{"bytes": content, "path": None} for _, content in rows]
    made = datasets.Dataset.from_dict({"image": images, "caption": [text for text, _ in rows]})
    made.cast_column("image", datasets.Image()).to_parquet(folder / "rows.parquet")
    return "rows.parquet"


def write_tar(folder, rows):
    with tarfile.open(folder / "rows.tar", "w") as made:
        for text, content in rows:
            for ending, inside in (("bmp", content), ("json", json.dumps({"caption": text}).encode())):
                member = tarfile.TarInfo(f"{text}.{ending}")
                member.size = len(inside)
                made.addfile(member, io.BytesIO(inside))
    return "rows.tar"


@pytest.mark.parametrize("write", [write_parquet, write_tar])
def test_images_inside_the_data(data, write):
    """They are known by their sizes, so that rows with them are found again, and other images are noticed."""
    rows = [("one", picture(1)), ("two", picture(2, 9)), ("three", picture(3, 10)), ("four", picture(3, 11))]

    def read(*rows):
        return data.placed(Source(path=str(data.folder / write(data.folder, rows)), format="caption"))

    *_, then = read(*rows)
    samples, _, now = read(*rows[1:])
    found = align(then, now, samples, ())
    assert found.changes == [] and found.now_of.tolist() == [-1, 0, 1, 2]
    other = rows[1][0], picture(9, 12)
    samples, _, now = read(rows[0], other, *rows[2:])
    assert "row 2 is not the row that it was" in align(then, now, samples, ()).changes[0]
    found = align(then, now, samples, (1,))
    assert found.changes == [] and found.mended == [1]


def test_places_are_saved(data, tmp_path):
    *_, then = data.read([*ROWS, BAD])
    with (tmp_path / "rows").open("wb"):
        save_places(tmp_path / "rows", {"train": then, "eval": then})
    for part in load_places(tmp_path / "rows").values():
        assert part.fingerprint == then.fingerprint and part.kept.tolist() == [True] * 6 + [False]
        for name in ("digests", "ends", "looked_at", "sizes"):
            assert np.array_equal(getattr(part, name), getattr(then, name))
    content = (tmp_path / "rows").read_bytes()
    for damaged in (content[:100], b"", content[:-200] + bytes(200)):
        (tmp_path / "rows").write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            load_places(tmp_path / "rows")
    (tmp_path / "rows").unlink()
    with pytest.raises(UserError, match="start a new run"):
        load_places(tmp_path / "rows")
