"""Sizes from headers equal the decoded images' sizes; references are followed only where they may be."""

import base64
import os

import numpy as np
import pytest
from encoded_images import AVIF, encode, noise
from PIL import ExifTags, Image

from finetune.data.images.image_files import absolute, check_image, count_pages, read_encoded, upright_size
from finetune.errors import InputError, Interrupted, UserError
from qwenvl.images.images import ImageAccess, load_image


def rotated(file_format, orientation, **options):
    image = Image.fromarray(noise(np.random.default_rng(orientation), 3, width=7, height=5))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(image, file_format, exif=exif, **options)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", *AVIF])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_the_loaded_images(tmp_path, file_format, orientation):
    data = rotated(file_format, orientation)
    (tmp_path / "image").write_bytes(data)
    access = ImageAccess(root=tmp_path)
    size = load_image(data).size
    assert size == ((7, 5) if orientation < 5 else (5, 7))
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (data, {"bytes": data, "path": None}, str(tmp_path / "image"), uri):
        assert upright_size(source, access) == size


@pytest.mark.parametrize("file_format", ["GIF", "BMP", "PPM"])
def test_size_of_formats_without_exif(file_format):
    data = encode(noise(np.random.default_rng(0), 3, width=7, height=5), file_format)
    assert upright_size(data, ImageAccess()) == (7, 5)


def test_a_header_is_enough_for_a_jpeg(tmp_path):
    data = rotated("JPEG", 6)
    start_of_scan = data.index(b"\xff\xda")
    (tmp_path / "half.jpg").write_bytes(data[: start_of_scan + 20])
    assert upright_size(str(tmp_path / "half.jpg"), ImageAccess(root=tmp_path)) == (5, 7)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"<html><body>no image</body></html>", "an HTML page"),
        (b"", "it is empty"),
        ("gone.png", "there is no such file"),
        ("data:image/png;base64,AAAA", "unknown kind"),
        ("https://example.org/a.png", "URLs are not fetched here"),
    ],
)
def test_no_size_of_what_is_no_image(tmp_path, source, reason):
    with pytest.raises(InputError, match=reason):
        upright_size(source, ImageAccess(root=tmp_path))


def test_an_image_beyond_the_limit_has_no_size():
    with pytest.raises(InputError, match="more than 10 in all"):
        upright_size(rotated("JPEG", 1), ImageAccess(max_pixels=10))


def test_relative_paths_start_at_the_root(tmp_path):
    assert absolute("a/b.png", tmp_path) == str(tmp_path / "a" / "b.png")
    assert absolute("/a/b.png", tmp_path) == "/a/b.png"
    for source in ("data:image/png;base64,AAAA", "HTTPS://example.org/a.png", b"bytes", "//server/share"):
        assert absolute(source, tmp_path) == source
    assert absolute({"bytes": b"x", "path": "a.png"}, tmp_path) == {"bytes": b"x", "path": "a.png"}


def test_a_signal_while_an_image_is_decoded_is_no_damage(monkeypatch):
    def stopped(*_):
        raise Interrupted(15, saved=False)

    data = rotated("PNG", 1)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", stopped)
    with pytest.raises(Interrupted):
        load_image(data)
    monkeypatch.setattr("PIL.Image.open", stopped)
    with pytest.raises(Interrupted):
        upright_size(data, ImageAccess())


@pytest.fixture
def places(tmp_path):
    """A root with an image, and what should not be reached from it."""
    root = tmp_path / "root"
    (root / "inside").mkdir(parents=True)
    (root / "inside" / "a.png").write_bytes(b"image")
    (root / "empty.png").write_bytes(b"")
    (tmp_path / "secret.png").write_bytes(b"image")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "in.png").symlink_to("inside/a.png")
    (root / "broken.png").symlink_to("nowhere")
    (root / "loop.png").symlink_to("loop.png")
    (root / "zero").symlink_to("/dev/zero")
    os.mkfifo(root / "fifo.png")
    return root


@pytest.mark.parametrize("path", ["inside/a.png", "in.png", "inside/../in.png"])
def test_paths_within_the_root_pass(places, path):
    check_image(absolute(path, places), ImageAccess(root=places))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("gone.png", "there is no file"),
        ("gone/a.png", "there is no file"),
        ("broken.png", "there is no file"),
        ("inside/a.png/b.png", "cannot be reached|there is no file"),
        ("loop.png", "cannot be reached"),
        ("../secret.png", "lies outside"),
        ("out.png", "lies outside"),
        ("up/secret.png", "lies outside"),
        ("/etc/passwd", "lies outside"),
        ("/dev/zero", "lies outside"),
        ("zero", "lies outside"),
        ("/proc/self/environ", "lies outside"),
        ("fifo.png", "is not a regular file"),
        ("inside", "is not a regular file"),
        ("empty.png", "is empty"),
        ("//server/share/a.png", "is a network path"),
        ("\\\\server\\share", "there is no file|network path"),
        ("file:///etc/passwd", "kind of URL"),
        ("ftp://example.org/a.png", "kind of URL"),
        ("http://169.254.169.254/latest", "is a URL"),
        ("a\0b", "no path can have"),
        ("\ud800.png", "no path can have"),
        ("x" * 5000, "cannot be reached"),
    ],
)
def test_other_paths_are_refused(places, path, reason):
    with pytest.raises(UserError, match=reason):
        check_image(absolute(path, places), ImageAccess(root=places))


def test_urls_pass_where_they_are_allowed(places):
    check_image("https://example.org/a.png", ImageAccess(root=places, allow_urls=True))


def test_a_file_that_is_too_long_is_refused(places):
    with pytest.raises(UserError, match="5 bytes, more than the 4 allowed"):
        check_image(str(places / "inside" / "a.png"), ImageAccess(root=places, max_bytes=4))


@pytest.mark.parametrize("read", [read_encoded, upright_size, count_pages])
def test_a_folder_that_became_a_link_is_not_followed(tmp_path, read):
    data = rotated("TIFF", 1)
    for name in ("root/scans", "secret"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.tif").write_bytes(data)
    access = ImageAccess(root=tmp_path / "root")
    path = str(tmp_path / "root" / "scans" / "a.tif")
    check_image(path, access)
    (tmp_path / "root" / "scans").rename(tmp_path / "root" / "before")
    (tmp_path / "root" / "scans").symlink_to(tmp_path / "secret")
    count_pages.__globals__["_pages_of_file"].cache_clear()
    with pytest.raises(InputError):
        read(path, access)
