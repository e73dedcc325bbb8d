"""What the page makes of uploaded files."""

import io

import pytest
from encoded_images import encode
from files_of_pages import BLUE, COLOURS, GREEN, encrypted_pdf, frames, pdf
from PIL import Image

from finetune.demo import pictures
from finetune.demo.pictures import PAGES_AT_ONCE, SHOWN, THUMBNAIL, draw, offer, read_upload, take
from finetune.errors import UserError
from qwenvl.text.grounding import parse_grounding


def png(size=(60, 40), colour=GREEN) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def test_an_image_is_offered_whole_and_shown_small(tmp_path):
    (offered,) = offer(read_upload("photo.png", png((3000, 1500))), tmp_path)
    assert (offered.name, offered.page) == ("photo.png", None)
    with Image.open(offered.thumbnail) as small:
        assert small.size == (THUMBNAIL, THUMBNAIL // 2)
    picture = take(offered, tmp_path)
    assert picture.size == (3000, 1500)
    with Image.open(picture.shown) as small:
        assert small.size == (SHOWN, SHOWN // 2)


@pytest.mark.parametrize("make", [pdf, frames])
def test_the_pages_of_a_file_are_offered_and_taken_one_by_one(make, tmp_path):
    offered = offer(read_upload("scan", make()), tmp_path)
    assert [one.name for one in offered] == ["scan, page 1", "scan, page 2", "scan, page 3"]
    for one, colour in zip(offered, COLOURS, strict=True):
        with Image.open(take(one, tmp_path).shown) as small:
            assert all(abs(a - b) < 4 for a, b in zip(small.getpixel((5, 5)), colour, strict=True))


def test_a_page_is_read_at_the_resolution_of_training_though_its_thumbnail_is_small(tmp_path):
    (offered,) = offer(read_upload("scan.pdf", pdf([BLUE], size=(720, 360))), tmp_path)
    with Image.open(offered.thumbnail) as small:
        assert max(small.size) <= THUMBNAIL
    assert take(offered, tmp_path).size == (1500, 750)  # 10 x 5 inches at 150 pixels an inch


def test_pages_are_offered_some_at_a_time(tmp_path):
    upload = read_upload("scan.pdf", pdf([BLUE] * (PAGES_AT_ONCE + 3), size=(20, 20)))
    assert [one.page for one in offer(upload, tmp_path)] == list(range(1, PAGES_AT_ONCE + 1))
    later = offer(upload, tmp_path, PAGES_AT_ONCE + 1)
    assert [one.page for one in later] == [PAGES_AT_ONCE + 1, PAGES_AT_ONCE + 2, PAGES_AT_ONCE + 3]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "bad: the file is empty"),
        (b"just text", "bad: its content is not an image"),
        (encrypted_pdf(), "bad: it is an encrypted PDF"),
        (b"%PDF-1.7\nnothing more", "bad: its PDF data cannot be read"),
        (png()[:60], "bad: its"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_sentence(data, said, tmp_path):
    with pytest.raises(UserError) as error:
        offer(read_upload("bad", data), tmp_path)
    assert str(error.value).startswith(said)
    assert "data" not in str(error.value).partition("PDF data")[2], "nobody's training data is meant"
    assert not list(tmp_path.iterdir())


def test_a_file_is_bounded_in_bytes_and_in_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_BYTES", 100)
    with pytest.raises(UserError, match=r"photo\.png: the file is larger than"):
        read_upload("photo.png", b"x" * 101)
    monkeypatch.undo()
    monkeypatch.setattr(pictures, "ACCESS", pictures.ImageAccess(max_pixels=1000))
    with pytest.raises(UserError, match=r"photo\.png: it has 60 x 40 pixels, more than 1000"):
        offer(read_upload("photo.png", png((60, 40))), tmp_path)


def test_boxes_are_drawn_on_the_picture(tmp_path):
    (offered,) = offer(read_upload("photo.png", png((1000, 1000), (255, 255, 255))), tmp_path)
    picture = take(offered, tmp_path)
    drawn = draw(picture, parse_grounding("<box>(200,300),(600,700)</box>").regions, tmp_path)
    with Image.open(drawn) as image:
        assert image.getpixel((400, 500)) == (255, 255, 255)
        orange = image.getpixel((201, 500))
    assert orange[0] > 200 > orange[2] and orange != (255, 255, 255)


def test_encoded_kinds_are_read(tmp_path):
    for kind in ("PNG", "JPEG", "WEBP"):
        assert offer(read_upload("photo", encode(Image.new("RGB", (30, 20), BLUE), kind)), tmp_path)
