"""Pages and frames by number: the right one, drawn right, or an error; none is left out silently."""

import io
import struct
import threading

import numpy as np
import pytest
from files_of_pages import BLUE, COLOURS, GREEN, RED, encrypted_pdf, frames, pdf
from PIL import Image

from qwenvl import ImageAccess, ImageError, load_image
from qwenvl.images.image_decoding import count_pages
from qwenvl.images.page_references import split_page
from qwenvl.images.pdf_pages import render_pdf_page
from qwenvl.images.tiff_pages import tiff_pages
from qwenvl.images.unusable_image import UnusableImage

FORMATS = ["TIFF", "GIF", "WEBP", "PNG"]


def colour_of(source, **options):
    pixels = np.asarray(load_image(source, **options)).reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    return tuple(pixels[0].tolist())


def made(kind):
    return pdf() if kind == "PDF" else frames(kind)


@pytest.mark.parametrize("kind", ["PDF", *FORMATS])
def test_each_page_is_read_by_its_number(kind, tmp_path):
    path = tmp_path / f"file.{kind.lower()}"
    path.write_bytes(made(kind))
    for number, colour in enumerate(COLOURS, start=1):
        assert colour_of(f"{path}#{number}") == colour
        assert colour_of(path, page=number) == colour
        assert colour_of({"bytes": made(kind), "path": None}, page=number) == colour
        assert colour_of({"bytes": made(kind), "path": "x", "page": number}) == colour
        assert colour_of({"bytes": None, "path": f"{path}#{number}"}) == colour
    assert count_pages(io.BytesIO(made(kind)), 10**6) == 3


@pytest.mark.parametrize("kind", ["PDF", *FORMATS])
def test_several_pages_and_none_named_are_refused(kind, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(made(kind))
    for source in (path, made(kind), {"bytes": made(kind), "path": None}):
        with pytest.raises(ImageError, match=r"it has 3 (page|frame)s and one must be named.*; write #1 after"):
            load_image(source)
    with pytest.raises(ImageError, match=r"4 is asked for, and it has 3 (page|frame)s; correct the number"):
        load_image(f"{path}#4")
    with pytest.raises(ImageError, match="page 0 is asked for, and pages are counted from 1"):
        load_image(f"{path}#0")
    with pytest.raises(ImageError, match="it names page 2, and page 3 is asked for"):
        load_image(f"{path}#2", page=3)


def test_the_only_page_needs_no_number(tmp_path):
    (tmp_path / "one.pdf").write_bytes(pdf([GREEN]))
    assert colour_of(tmp_path / "one.pdf") == GREEN and colour_of(f"{tmp_path}/one.pdf#1") == GREEN
    assert colour_of(frames("TIFF", [BLUE])) == BLUE and colour_of(frames("GIF", [BLUE]), page=1) == BLUE


@pytest.mark.parametrize(
    ("reference", "split"),
    [
        ("a.pdf#3", ("a.pdf", 3)),
        ("a#1.png", ("a#1.png", None)),
        ("a#1.pdf#2", ("a#1.pdf", 2)),
        ("a.pdf#", ("a.pdf#", None)),
        ("folder/#3", ("folder/#3", None)),
        ("a.pdf#-1", ("a.pdf#-1", None)),
        ("a.pdf#007", ("a.pdf", 7)),
        ("a\n.pdf#3", ("a\n.pdf", 3)),
    ],
)
def test_references(reference, split):
    assert split_page(reference) == split


def test_a_file_whose_own_name_ends_in_a_number_sign_is_that_file(tmp_path):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "scan#2", "PNG")
    Image.new("RGB", (4, 4), BLUE).save(tmp_path / "hash#1.png")
    assert colour_of(tmp_path / "scan#2") == RED and colour_of(tmp_path / "hash#1.png") == BLUE
    (tmp_path / "scan").write_bytes(pdf())
    with pytest.raises(ImageError, match="it may be the file of that name or page 2 of 'scan'"):
        load_image(tmp_path / "scan#2")
    assert colour_of(tmp_path / "scan#3") == BLUE


def test_a_page_reaches_no_further_than_its_file(tmp_path):
    (tmp_path / "out.pdf").write_bytes(pdf())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.pdf").symlink_to(tmp_path / "out.pdf")
    for reference in ("../out.pdf#1", "link.pdf#1", str(tmp_path / "out.pdf#1")):
        with pytest.raises(ImageError, match="lies outside the image root"):
            load_image(reference, access=ImageAccess(root=tmp_path / "in"))
    with pytest.raises(ImageError, match="there is no such file"):
        load_image("none.pdf#1", access=ImageAccess(root=tmp_path))


def test_a_pdf_is_drawn_at_the_resolution_asked_for():
    # A red square of 18 points at the lower left of a page of 72 x 36, the rest white.
    data = pdf(contents=[b"1 0 0 rg 0 0 18 18 re f"])
    for dpi in (72, 144):
        scale = dpi // 72
        pixels = np.asarray(load_image(data, access=ImageAccess(dpi=dpi)))
        expected = np.full((36 * scale, 72 * scale, 3), 255, np.uint8)
        expected[18 * scale :, : 18 * scale] = RED
        np.testing.assert_array_equal(pixels, expected)
    assert load_image(data).size == (150, 75)
    assert load_image(pdf(contents=[b""], extra="/Rotate 90")).size == (75, 150)


def test_a_pdf_beyond_the_pixels_is_refused_before_it_is_drawn():
    huge = pdf(contents=[b""], size=(14_400, 14_400))
    with pytest.raises(ImageError, match=r"page 1: it has 30000 x 30000 pixels.*at 150 dpi; lower the dpi"):
        load_image(huge)


def test_drawing_takes_no_longer_than_allowed():
    content = b"0 0 m 70 30 l S\n" * 20_000
    with pytest.raises(UnusableImage, match=r"drawing page 1 takes more than 0 s"):
        render_pdf_page(pdf(contents=[content]), 1, check_size=lambda size: None, seconds=0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encrypted_pdf(), "it is an encrypted PDF; save it without a password"),
        (b"%PDF-1.7\n", "its PDF data cannot be read"),
        (pdf()[:200], "its PDF data cannot be read"),
        (pdf([]), "its PDF data cannot be read"),
    ],
)
def test_pdfs_that_cannot_be_read_say_why(data, reason, tmp_path):
    with pytest.raises(ImageError, match=reason):
        load_image(data)
    with pytest.raises(UnusableImage, match=reason):
        count_pages(io.BytesIO(data), 10**6)


def test_damaged_pdfs_raise_nothing_but_image_error():
    draw = np.random.default_rng(0)
    whole = pdf()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(int(draw.integers(1, 6))):
            data[draw.integers(5, len(data))] = draw.integers(0, 256)
        try:
            assert load_image(bytes(data), access=ImageAccess(max_pixels=10**6), page=1).mode == "RGB"
        except ImageError as error:
            assert error.remedy


def test_threads_draw_the_same_pixels():
    data, seen = pdf(contents=[b"0 0 m 70 30 l S\n" * 200] * 8), {}

    def draw(number):
        seen[number] = load_image(data, page=number).tobytes()

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8 and len(set(seen.values())) == 1


def directories(*kinds, order="<", big=False):
    """A TIFF of directories with these values of NewSubfileType, None for none; nothing else is in them."""
    data = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    data += struct.pack(order + "HHQ", 8, 0, 16) if big else struct.pack(order + "I", 8)
    for number, kind in enumerate(kinds):
        form, entry = ("Q", "HHQI4x") if big else ("H", "HHII")
        entries = [] if kind is None else [struct.pack(order + entry, 254, 4, 1, kind)]
        entries.append(struct.pack(order + entry, 256, 4, 1, 7))
        body = struct.pack(order + form, len(entries)) + b"".join(entries)
        size = 8 if big else 4
        after = len(data) + len(body) + size if number < len(kinds) - 1 else 0
        data += body + struct.pack(order + ("Q" if big else "I"), after)
    return data


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_reduced_copies_and_masks_are_no_pages(order, big):
    def pages(*kinds):
        return tiff_pages(io.BytesIO(directories(*kinds, order=order, big=big)))

    assert pages(None) == [0] and pages(None, None, 2) == [0, 1, 2]
    assert pages(0, 1, 4, 0) == [0, 3]  # a page, its reduced copy and mask, another page
    assert pages(1, 0) == [1] and pages(1) == [0]


def test_a_chain_of_directories_that_is_cut_off_or_turns_back():
    whole = directories(None, None)
    assert tiff_pages(io.BytesIO(whole[:-10])) == [0, 1]
    turned = whole[:-4] + struct.pack("<I", 8)
    assert tiff_pages(io.BytesIO(turned)) == [0, 1]
    with pytest.raises(UnusableImage, match="more than 10,000 pages"):
        tiff_pages(io.BytesIO(directories(*[None] * 10_001)))


def test_a_picture_with_a_reduced_copy_is_one_page(tmp_path):
    images = [Image.new("RGB", (8, 8), RED), Image.new("RGB", (4, 4), BLUE)]
    images[1].encoderinfo = {"tiffinfo": {254: 1}}
    images[0].save(tmp_path / "a.tif", save_all=True, append_images=images[1:])
    assert colour_of(tmp_path / "a.tif") == RED


def test_a_far_frame_of_large_ones_is_refused(monkeypatch):
    monkeypatch.setattr("qwenvl.images.image_decoding._MOST_DRAWN", 10_000)
    data = frames("GIF", [RED, GREEN] * 30, size=(20, 10))
    assert colour_of(data, page=50) == GREEN
    with pytest.raises(ImageError, match="frame 51 comes after more than 10,000 pixels of others"):
        load_image(data, page=51)


def test_pixels_have_no_pages():
    with pytest.raises(ImageError, match="it is pixels, which have no pages"):
        load_image(np.zeros((4, 4, 3), np.uint8), page=1)
