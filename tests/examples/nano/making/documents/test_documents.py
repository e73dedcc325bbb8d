"""The generator of small documents: what it prints is known, belongs to its split, and can be trained on."""

import io
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageDraw

from examples.nano.making.documents import write
from examples.nano.making.documents.__main__ import main
from examples.nano.making.documents.conversations import KINDS
from examples.nano.making.documents.document import make_document
from examples.nano.making.documents.families import FAMILIES, HELD_OUT, LARGE
from examples.nano.making.documents.lettering import Look
from examples.nano.making.documents.page import MARGIN, Page, turned
from examples.nano.making.documents.values import (
    CLOSED_KINDS,
    MONEY,
    SPLITS,
    DoesNotFit,
    Values,
    print_money,
    split_of,
)
from examples.nano.making.documents.values import KINDS as VALUE_KINDS
from examples.nano.making.documents.write import Plan, conversations_of, document_of
from examples.nano.making.views_experiment import PAGE
from finetune.data.checks.checking import check_samples
from finetune.data.samples import Samples
from finetune.recipe import Source

TRAINED = tuple(family for family in FAMILIES if family not in (*HELD_OUT, *LARGE))
WITH_TEXT = tuple(family for family in FAMILIES if family != "shapes")


def documents(family, count, split="train", **settings):
    return [make_document(family, seed=3, split=split, index=index, **settings) for index in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_is_made_again_from_its_name(family):
    base = {"seed": 0, "split": "train", "index": 4, "copy": 0}
    first = make_document(family, **base, difficulty=1.0)
    make_document(family, **base | {"index": 9})  # what was made before does not matter
    again = make_document(family, **base, difficulty=1.0)
    assert first.image.tobytes() == again.image.tobytes()
    assert replace(first, image=None) == replace(again, image=None)
    for other in ({"seed": 1}, {"index": 5}, {"split": "test"}, {"copy": 1}):
        assert make_document(family, **base | other, difficulty=1.0).image.tobytes() != first.image.tobytes()


@pytest.mark.parametrize(
    ("family", "lines"),
    [
        (
            "form",
            "hour = 18h54 / day = Sep 1, 2022 / place = Evia / item = Dry Yogurt / shop = Willow Store / desk = S32",
        ),
        ("table", "Who Hour / Dora Riba 04:51 / I. Wolfen 12:30"),
        ("card", "LICLI 09:31 / THEAST 760 7666 / Plun TREATRECLIN / Shawox ROYAL PIZZA"),
        (
            "boarding",
            "BRIGINO AIR / PASSENGER / R. GUPTLEY / FLIGHT BAGS / M1U9 23.2 LB"
            " / ORIGIN BOARDING / LININO 15H22 / DEPARTS SEAT / 17/03/18 U0",
        ),
    ],
)
def test_documents_stay_the_same_from_version_to_version(family, lines):
    """Made by this generator under Python 3.11 and Pillow 13; Pillow 12.3 makes the same."""
    assert " / ".join(make_document(family, seed=0, split="train", index=0).lines) == lines


@pytest.fixture(scope="module")
def of_all_splits():
    """Split -> some hundred documents, clean ones, which are made faster."""
    return {
        split: [
            make_document(family, seed=seed, split=split, index=index, image_size=140, difficulty=0)
            for family in FAMILIES
            for seed in (0, 1)
            for index in range(45)
        ]
        for split in SPLITS
    }


def test_values_and_layouts_belong_to_one_split(of_all_splits):
    values, layouts = {}, {}
    for split, made in of_all_splits.items():
        for document in made:
            assert split_of(document.layout) == split
            layouts.setdefault(split, set()).add(document.layout)
            for field in document.fields:
                if field.kind not in CLOSED_KINDS:
                    # A line of several values is no value, but cannot be in two splits either.
                    assert field.kind == "line" or split_of(field.value) == split, (document.family, field)
                    values.setdefault(split, set()).add(field.value.casefold())
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not values[first] & values[second]
        assert not layouts[first] & layouts[second]
    assert min(map(len, values.values())) > 1000
    assert min(map(len, layouts.values())) > 600


def test_the_held_out_family_has_labels_and_questions_of_its_own(of_all_splits):
    labels, questions, kinds = {}, {}, {}
    for document in (document for document in of_all_splits["train"] if document.family not in LARGE):
        side = document.family in HELD_OUT
        labels.setdefault(side, set()).update(field.label.casefold() for field in document.fields if field.label)
        kinds.setdefault(side, set()).update(field.kind for field in document.fields)
        names = {name for field in document.fields for name in (*field.names, *field.asks)}
        questions.setdefault(side, set()).update(name.casefold() for name in names)
    assert not labels[True] & labels[False]
    assert not questions[True] & questions[False]
    assert kinds[True] <= kinds[False]


def test_labels_of_cards_are_words_of_any_kind_and_stand_above_or_before_their_values():
    made = documents("card", 60, difficulty=0)
    kinds_of_label, above = {}, 0
    for document in made:
        assert {field.kind for field in document.fields} <= {*VALUE_KINDS}
        for field in document.fields:
            kinds_of_label.setdefault(field.label.casefold(), set()).add(field.kind)
            line = next(line for line in document.lines if field.label in line)
            above += field.value not in line
    assert max(map(len, kinds_of_label.values())) > 1  # a label does not tell what kind its value is
    assert 0.4 < above / sum(len(document.fields) for document in made) < 0.95


def test_each_value_of_a_register_is_whole_in_a_quarter_of_the_page():
    for document in documents("register", 20, image_size=PAGE, difficulty=0):
        assert len(document.fields) > 25
        assert len({field.names for field in document.fields}) == len(document.fields)
        for x1, y1, x2, y2 in (field.box for field in document.fields):
            assert x2 <= PAGE / 1.9 or x1 >= PAGE - PAGE / 1.9
            assert y2 <= PAGE / 1.9 or y1 >= PAGE - PAGE / 1.9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("size", "count"), [(112, 30), (140, 30), (448, 5)])
def test_fields_lie_on_the_page_and_not_on_each_other(family, size, count):
    for document in documents(family, count, split="test", image_size=size):
        assert document.image.size == (size, size)
        assert document.image.mode == "RGB"
        boxes = [field.box for field in document.fields if field.key != "word"]
        for x1, y1, x2, y2 in (field.box for field in document.fields):
            assert 0 <= x1 < x2 <= size
            assert 0 <= y1 < y2 <= size
        for place, one in enumerate(boxes):
            for other in boxes[place + 1 :]:
                wide = min(one[2], other[2]) - max(one[0], other[0])
                high = min(one[3], other[3]) - max(one[1], other[1])
                # Turned by two degrees, upright boxes of neighbours reach into each other a little.
                assert wide <= 0 or high <= 3 + 0.035 * size, (document.layout, one, other)


@pytest.mark.parametrize("family", WITH_TEXT)
def test_lines_hold_the_values_in_reading_order(family):
    for document in documents(family, 40, difficulty=0):
        text = "\n".join(document.lines)
        assert all(field.value in text for field in document.fields)
        assert all(line == line.strip() and line for line in document.lines)
        if family == "chart":  # values above upright bars are one line at several heights
            continue
        bottoms = {}
        for field in document.fields:
            found = [place for place, line in enumerate(document.lines) if field.value in line]
            if len(found) == 1:
                bottoms.setdefault(found[0], []).append(field.box[3])
        ordered = [bottoms[place] for place in sorted(bottoms)]
        for above, below in pairwise(ordered):
            assert max(above) < max(below) + 1, document.lines


def test_a_receipts_prices_make_its_total():
    for document in documents("receipt", 60):
        prices = [field.amount for field in document.fields if field.key == "price"]
        (total,) = [field.amount for field in document.fields if field.key == "total"]
        assert sum(prices) == total


def test_a_comparable_copy_has_prices_in_the_same_currency():
    seen = set()
    for index in range(40):
        pair = [make_document("receipt", seed=0, split="train", index=index, copy=copy) for copy in (0, 1)]
        assert pair[0].money == pair[1].money
        assert pair[0].fields != pair[1].fields
        seen.add(pair[0].money)
    assert len(seen) > 6


def test_money_is_printed_in_several_ways():
    printed = {money: print_money(1240, money) for money in MONEY}
    assert (printed["$%"], printed["% EUR"], printed["%-"]) == (("$12.40", 1240), ("12,40 EUR", 1240), ("12,-", 1200))
    assert len(set(printed.values())) == len(MONEY)


def test_a_value_comes_once_on_a_page_and_no_longer_than_asked():
    values = Values(random.Random(0), "test", "$%")
    drawn = [values.new("place", longest=3).text for _ in range(40)]
    assert len(set(drawn)) == 40
    assert max(map(len, drawn)) <= 3
    with pytest.raises(DoesNotFit):
        values.new("date", longest=4)


def test_the_shares_of_the_splits():
    drawn = [split_of(f"value {number}") for number in range(20_000)]
    assert [round(drawn.count(split) / 200) for split in SPLITS] == [80, 10, 10]
    assert split_of("Ada Lund") == split_of("ADA LUND")


@pytest.mark.parametrize("align", ["left", "centre", "right"])
@pytest.mark.parametrize("look", [Look(12), Look(11, weight=0.3), Look(14, stretch=0.9)])
def test_the_box_of_a_line_is_where_its_ink_is(look, align):
    page = Page(140, random.Random(2), difficulty=0)
    before = np.asarray(page.image, int)
    x = {"left": 20, "centre": 70, "right": 120}[align]
    box = page.write("Ada Lund, gj 12.40", x, 60, look, align=align)
    changed = np.abs(np.asarray(page.image, int) - before).sum(-1)
    ink = changed > 0.26 * changed.max()
    (ys, xs) = ink.nonzero()
    assert np.abs(np.array(box) - [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).max() <= 1
    start = {"left": box[0] - 20, "centre": (box[0] + box[2]) / 2 - 70, "right": 120 - box[2]}[align]
    assert abs(start) <= 3


def test_what_is_too_long_is_squeezed_a_little_and_then_refused():
    page = Page(140, random.Random(2), difficulty=0)
    box = page.write("A line that is just a bit long", MARGIN, 20, Look(11))
    assert box[2] <= 140 - MARGIN + 1
    with pytest.raises(DoesNotFit):
        page.write("A line that is very much too long for it", MARGIN, 20, Look(11))
    with pytest.raises(DoesNotFit):
        page.write("low", MARGIN, 130, Look(11))


@pytest.mark.parametrize("angle", [-2.0, -0.7, 1.3, 2.0])
def test_boxes_turn_with_the_page(angle):
    image = Image.new("L", (140, 140))
    ImageDraw.Draw(image).rectangle((20, 90, 99, 109), fill=255)
    ink = np.asarray(image.rotate(angle, Image.Resampling.BICUBIC)) > 100
    ys, xs = ink.nonzero()
    expected = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    np.testing.assert_allclose(turned((20, 90, 100, 110), 140, angle), expected, atol=1.0)
    assert turned((20, 90, 100, 110), 140, 0.0) == (20, 90, 100, 110)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checked(path, tokenizer):
    source = Source(path=str(path), format="messages")
    return check_samples(Samples([source]), tokenizer, max_length=1024)


def test_a_set_can_be_trained_on_and_does_not_depend_on_the_processes(tmp_path, monkeypatch, published_tokenizer):
    monkeypatch.setitem(write.SHARD, "jsonl", 8)
    for workers in ("1", "2"):
        arguments = ["--to", str(tmp_path / workers), "--count", "24", "--workers", workers, "--palette", "16"]
        assert main([*arguments, "--families", ",".join(FAMILIES)]) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    found = checked(tmp_path / "1" / "train.jsonl", published_tokenizer)
    assert len(found.kept) == found.total == 24 * 3
    assert (found.images == 2).any()


def test_parquet_holds_what_jsonl_holds(tmp_path, published_tokenizer):
    import datasets

    arguments = ["--to", str(tmp_path), "--count", "16", "--split", "test", "--seed", "4"]
    assert main([*arguments, "--format", "parquet"]) == 0
    rows = datasets.Dataset.from_parquet(str(tmp_path / "test" / "00000.parquet"), cache_dir=tmp_path / "cache")
    plan = Plan("test", TRAINED, tuple(KINDS), 16, seed=4)
    expected = [(index, found) for index in range(16) for found in conversations_of(plan, index)]
    assert [(row["kind"], row["answers"]) for row in rows] == [(found.kind, found.answers) for _, found in expected]
    for row, (index, _) in zip(rows, expected, strict=True):
        assert row["document"] == f"{index:06}"
        assert row["images"][0].tobytes() == document_of(plan, index).image.tobytes()
    found = checked(tmp_path / "test", published_tokenizer)
    assert len(found.kept) == found.total == len(rows)


def test_a_palette_keeps_the_colours_of_shapes():
    for document in documents("shapes", 30):
        with Image.open(io.BytesIO(write.png(document.image, 16))) as file:
            change = np.asarray(file.convert("RGB"), int) - np.asarray(document.image, int)
        for x1, y1, x2, y2 in (np.round(field.box).astype(int) for field in document.fields):
            assert np.abs(np.median(change[y1:y2, x1:x2], axis=(0, 1))).max() < 40


def test_another_split_can_be_added_but_nothing_is_overwritten(tmp_path, capsys):
    arguments = ["--to", str(tmp_path), "--count", "4", "--kinds", "question", "--families", "form"]
    assert main([*arguments, "--split", "train"]) == main([*arguments, "--split", "test"]) == 0
    before = contents(tmp_path)
    assert main([*arguments, "--split", "train", "--seed", "1"]) == 2
    assert "train.jsonl exists; delete it" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert len(before) == 2 + 2 * 4


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for where in (["--to", str(tmp_path / "file" / "set")], ["--preview", str(tmp_path / "file" / "sheet.png")]):
        assert main([*where, "--count", "1", "--kinds", "question", "--families", "form"]) == 2
        told = capsys.readouterr().err
        assert where[1] in told and "file" in told and "Errno" not in told


def test_a_set_that_fails_halfway_leaves_nothing(tmp_path, monkeypatch, capsys):
    encode, calls = write.png, []

    def fails(image, palette):
        calls.append(1)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return encode(image, palette)

    monkeypatch.setattr(write, "png", fails)
    assert main(["--to", str(tmp_path), "--count", "20"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--to", "x"], "--count: say how many"),
        (["--to", "x", "--count", "0"], "--count: must be 1 to"),
        (["--to", "x", "--count", "3", "--image-size", "100"], "--image-size: must be 112 to 448, not 100"),
        (["--to", "x", "--count", "3", "--families", "form,forms"], "no family 'forms'"),
        (["--to", "x", "--count", "3", "--families", "shapes", "--kinds", "question"], "shapes has none of question"),
        (["--to", "x", "--preview", "x.png"], "not allowed with"),
    ],
)
def test_wrong_arguments_are_told(arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_a_preview_shows_pages_and_conversations(tmp_path, capsys):
    arguments = ["--preview", str(tmp_path / "sheet.png"), "--count", "2", "--families", "form,shapes"]
    assert main([*arguments, "--kinds", "question,count"]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 2 * 140
    shown = capsys.readouterr().out
    assert "[question, form]" in shown
    assert "[count, shapes]" in shown
