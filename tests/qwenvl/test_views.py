"""An image as several pictures: where its parts lie, how they are loaded, and what a record says of them."""

import itertools
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from qwenvl import ImageAccess, ImageError, InputError, load_image
from qwenvl.checkpoint.record import RECORD, ModelRecord, read_record, write_record
from qwenvl.images import image_processor, images
from qwenvl.images.images import ImageReader
from qwenvl.views import PagePart, Views, whole_of

FOUR = Views(page=True, grid=(2, 2), overlap=0.1)


def test_where_the_parts_lie():
    # 1000 / 1.9 = 526.3: a part begins at the floor of its beginning and ends at the ceiling of its end.
    assert FOUR.crop_boxes(1000, 800) == [
        (0, 0, 527, 422),
        (473, 0, 1000, 422),
        (0, 378, 527, 800),
        (473, 378, 1000, 800),
    ]
    assert Views(True, (1, 3), 0.0).crop_boxes(10, 4) == [(0, 0, 4, 4), (3, 0, 7, 4), (6, 0, 10, 4)]
    assert Views(True, (2, 1), 0.5).crop_boxes(6, 9) == [(0, 0, 6, 6), (0, 3, 6, 9)]
    assert Views(True, (3, 1), 0.2).crop_boxes(5, 26) == [(0, 0, 5, 10), (0, 8, 5, 18), (0, 16, 5, 26)]


@pytest.mark.parametrize("overlap", [0, 0.1, 0.25, 1 / 3, 0.5])
@pytest.mark.parametrize("parts", [2, 3, 5, 8])
def test_every_pixel_is_in_a_part_and_neighbours_share_what_they_should(parts, overlap):
    views = Views(True, (1, parts), overlap)
    for length in (*range(1, 40), 447, 1000, 9999):
        boxes = views.crop_boxes(length, 1)
        spans = [(left, right) for left, _, right, _ in boxes]
        assert spans[0][0] == 0 and spans[-1][1] == length
        side = length / (parts - (parts - 1) * overlap)
        for left, right in spans:
            assert left < right and side - 1e-9 <= right - left < side + 2
        for (_, right), (left, _) in itertools.pairwise(spans):
            assert left <= right and right - left >= overlap * side - 1e-9
        # The same from the other end, to a pixel.
        turned = [(length - right, length - left) for left, right in reversed(spans)]
        assert all(
            abs(a - b) <= 1 for one, two in zip(spans, turned, strict=True) for a, b in zip(one, two, strict=True)
        )


def test_pictures_are_the_page_and_its_parts_row_by_row():
    pictures = FOUR.pictures("scan.png")
    assert pictures == ["scan.png", *(PagePart("scan.png", FOUR, number) for number in (1, 2, 3, 4))]
    assert FOUR.count == 5 == len(pictures) and {whole_of(picture) for picture in pictures} == {"scan.png"}
    alone = Views(False, (1, 2), 0.0)
    assert alone.count == 2 and alone.pictures("a") == [PagePart("a", alone, 1), PagePart("a", alone, 2)]
    assert pickle.loads(pickle.dumps(pictures)) == pictures
    assert FOUR.scale == pytest.approx(1.9) and Views(True, (1, 3), 0.0).scale == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"grid": (1, 1)}, "1 x 1 is the whole page"),
        ({"grid": (0, 2)}, "from 1 to 8"),
        ({"grid": (2, 9)}, "from 1 to 8"),
        ({"grid": (2,)}, "two numbers"),
        ({"grid": (True, 2)}, "two numbers"),
        ({"grid": "22"}, "two numbers"),
        ({"overlap": 0.6}, "from 0 to 0.5"),
        ({"overlap": float("nan")}, "from 0 to 0.5"),
        ({"overlap": "0.1"}, "from 0 to 0.5"),
        ({"page": 1}, "true or false"),
    ],
)
def test_other_values_are_refused(given, said):
    with pytest.raises(InputError, match=said):
        Views(**given)


def test_a_part_is_cut_from_the_upright_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = np.rot90(pixels, -1)
    for source, access in ((str(tmp_path / "turned.png"), ImageAccess()), ("turned.png", ImageAccess(root=tmp_path))):
        page, *parts = FOUR.pictures(source)
        np.testing.assert_array_equal(load_image(page, access=access), upright)
        for part, (left, top, right, bottom) in zip(parts, FOUR.crop_boxes(30, 50), strict=True):
            np.testing.assert_array_equal(load_image(part, access=access), upright[top:bottom, left:right])
    with pytest.raises(ImageError, match=r"^row 3 \('none.png'\): "):
        load_image(PagePart("none.png", FOUR, 2), access=ImageAccess(root=tmp_path), name="row 3")


def test_pictures_that_follow_one_another_are_decoded_once(tmp_path, monkeypatch):
    for name in "ab":
        Image.new("RGB", (9, 7), "teal").save(tmp_path / f"{name}.png")
    decoded = []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda *given, **options: decoded.append(1) or decode(*given, **options))
    sources = [picture for name in "ab" for picture in FOUR.pictures(str(tmp_path / f"{name}.png"))]
    reader = ImageReader()
    assert [reader.load(source).size for source in sources] == [load_image(source).size for source in sources]
    assert len(decoded) == 2 + 10
    processor = image_processor.QwenVLImageProcessor(size=8)
    together = processor(sources, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert len(decoded) == 14 and len(together) == 10
    # What another access may not reach is not taken from the reader.
    with pytest.raises(ImageError):
        reader.load(sources[-1], access=ImageAccess(root=tmp_path / "inner"))


def test_a_record_says_the_views(tmp_path):
    write_record(tmp_path, ModelRecord(chat_format="chatml", views=FOUR))
    written = json.loads((tmp_path / RECORD).read_text())
    assert written["views"] == {"page": True, "grid": [2, 2], "overlap": 0.1}
    found = read_record(tmp_path)
    assert found is not None and found.views == FOUR
    write_record(tmp_path, ModelRecord(chat_format="chatml"))
    assert "views" not in json.loads((tmp_path / RECORD).read_text())
    for damaged in (
        {"page": True, "grid": [2, 2]},
        {"page": True, "grid": [2, 2], "overlap": 0.1, "size": 3},
        {"page": True, "grid": [1, 1], "overlap": 0.1},
        {"page": True, "grid": [2, "2"], "overlap": 0.1},
    ):
        (tmp_path / RECORD).write_text(json.dumps({**written, "views": damaged}))
        with pytest.raises(InputError, match=r"qwenvl.json: views: .*Restore the file"):
            read_record(tmp_path)
    (tmp_path / RECORD).write_text(json.dumps({**written, "views": [2, 2]}))
    with pytest.raises(InputError, match=r"qwenvl.json: views: .* is not understood"):
        read_record(tmp_path)
