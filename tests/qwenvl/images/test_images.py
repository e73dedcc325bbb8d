"""`load_image`: what its sources may be, and that nothing outside its reach is opened."""

import base64
import io
import os
import pickle
import re
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded_images import encode, grey, noise, pixels_of
from PIL import Image

from qwenvl.images.images import ImageAccess, ImageError, load_image

# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pixels():
    return noise(np.random.default_rng(7), 3, width=6, height=5)


def test_every_source_gives_the_same_pixels(pixels, tmp_path, monkeypatch):
    data = encode(pixels)
    (tmp_path / "a b.png").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    tensor = torch.from_numpy(pixels)
    sources = [
        data,
        bytearray(data),
        memoryview(data),
        "a b.png",
        str(tmp_path / "a b.png"),
        tmp_path / "a b.png",
        "data:image/png;base64," + base64.b64encode(data).decode(),
        {"bytes": data, "path": None},
        {"bytes": data, "path": "gone.png"},
        {"bytes": None, "path": "a b.png"},
        Image.open(io.BytesIO(data)),
        Image.fromarray(pixels),
        pixels,
        pixels[::-1, ::-1][::-1, ::-1],
        np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]),
        tensor,
        tensor.permute(2, 0, 1),
    ]
    for source in sources:
        np.testing.assert_array_equal(pixels_of(source), pixels)
    for source in [pixels[..., 0], pixels[..., :1], tensor[..., 0], tensor[..., 0][None]]:
        np.testing.assert_array_equal(pixels_of(source), grey(pixels[..., 0]))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "a NoneType is not an image source"),
        (["a.png"], "a list is not an image source"),
        (3, "a int is not an image source"),
        (np.zeros((4, 4, 3)), "its pixels are float64"),
        (np.zeros((4, 4), bool), "its pixels are bool"),
        (np.zeros((3, 4, 5), np.uint8), "its shape is not"),
        (np.zeros((0, 4, 3), np.uint8), "its shape is not"),
        (torch.zeros(3, 4, 4), "its pixels are torch.float32"),
        (torch.zeros(3, 4, 4, dtype=torch.bfloat16), "its pixels are torch.bfloat16"),
        (torch.zeros(3, 4, 3, dtype=torch.uint8), "fits channels first and channels last"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "its shape is not"),
        ({"bytes": None, "path": None}, "hold no image"),
        ({"path": b"x.png"}, "hold no image"),
        ({"url": "http://x/"}, "other keys"),
        (b"", "it is empty"),
        ("data:image/png;base64,", "it is empty"),
        ("data:text/html;base64,AAAA", "no base64 image"),
        ("data:image/png,AAAA", "no base64 image"),
        ("data:image/png;base64,AA\nAA", "base64 is malformed"),
        ("data:image/png;base64,AAAA=", "base64 is malformed"),
        ("data:image/png;base64,é", "base64 is malformed"),
        ("", "the path is empty"),
        (".", "it is a folder"),
        ("missing.png", "there is no such file"),
        ("a\0b.png", "it cannot be opened"),
        ("x" * 5000, "it cannot be opened"),
        ("\ud800.png", "it cannot be opened"),
        ("file:///etc/hostname", "this kind of URL is not read"),
        ("file:/etc/hostname", "this kind of URL is not read"),
        ("ftp://host/a.png", "this kind of URL is not read"),
        (Path("ftp://host/a.png"), "this kind of URL is not read"),
        ("s3://bucket/a.png", "this kind of URL is not read"),
        (" http://host/a.png", "this kind of URL is not read"),
        ("//host/share/a.png", "network paths are not read"),
        ("\\\\host\\share\\a.png", "network paths are not read"),
        ("http://host/a.png", "URLs are not fetched here"),
        ("HTTPS://host/a.png", "URLs are not fetched here"),
    ],
)
def test_what_is_no_source(source, reason, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("a name was looked up"))
    with pytest.raises(ImageError) as caught:
        load_image(source, name="rows.jsonl row 7")
    assert reason in str(caught.value)
    assert str(caught.value).startswith("rows.jsonl row 7 (")
    assert len(str(caught.value)) < 700
    str(caught.value).encode()  # printable anywhere
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # loader workers send it


def test_errors_name_the_image():
    for source, name in [
        ("no/such.png", "'no/such.png'"),
        (b"abc", "3 bytes"),
        ("data:image/png;base64,AAAA", "data URI of 26 bytes"),
        ({"bytes": b"abc", "path": "p.png"}, "'p.png'"),
        (Image.new("I", (2, 1), -5), "PIL image, I, 2 x 1"),
        ("https://user:secret@host/a.png?q=1", "'https://***@host/a.png?q=1'"),
    ]:
        with pytest.raises(ImageError) as caught:
            load_image(source)
        assert str(caught.value).startswith(name + ": ")
        assert caught.value.image == name


def test_access_travels_to_workers(tmp_path):
    access = ImageAccess(root=str(tmp_path), allow_urls=True)
    assert access.root == tmp_path
    assert pickle.loads(pickle.dumps(access)) == access


# --- files -----------------------------------------------------------------------------------------------------------


def within(seconds: float, call):
    """The call's exception, or a failure where it hangs."""
    outcome = []

    def run():
        try:
            outcome.append(call())
        except ImageError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, "it hangs"
    return outcome[0]


@pytest.fixture
def tree(tmp_path):
    """root/inside.png, root/sub/deep.png; outside.png and links to it."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    data = encode(Image.new("RGB", (2, 2), "red"))
    for path in (root / "inside.png", root / "sub" / "deep.png", tmp_path / "outside.png"):
        path.write_bytes(data)
    (root / "link_out.png").symlink_to(tmp_path / "outside.png")
    (root / "link_in.png").symlink_to("sub/deep.png")
    (root / "folder_out").symlink_to(tmp_path)
    (root / "loop.png").symlink_to("loop.png")
    (tmp_path / "root_link").symlink_to(root)
    (tmp_path / "rootkit").mkdir()
    (tmp_path / "rootkit" / "x.png").write_bytes(data)
    return tmp_path


def test_paths_inside_the_root(tree):
    for root in (tree / "root", tree / "root_link"):
        access = ImageAccess(root=root)
        for path in ("inside.png", "./sub/../inside.png", "link_in.png", tree / "root" / "sub" / "deep.png"):
            assert load_image(path, access=access).size == (2, 2)


def test_paths_outside_the_root_are_not_opened(tree, monkeypatch):
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *a, **k: opened.append(str(path)) or real(path, *a, **k))
    monkeypatch.setattr(os, "supports_dir_fd", {os.open})
    access = ImageAccess(root=tree / "root")
    for path in (
        "../outside.png",
        "sub/../../outside.png",
        "link_out.png",
        "folder_out/outside.png",
        "folder_out/root/../outside.png",
        str(tree / "outside.png"),
        str(tree / "rootkit" / "x.png"),
        "../rootkit/x.png",
        "/etc/passwd",
        {"bytes": None, "path": "../outside.png"},
    ):
        with pytest.raises(ImageError, match="outside the image root"):
            load_image(path, access=access)
    assert opened == []
    assert load_image("inside.png", access=access).size == (2, 2)
    assert opened == [str(tree / "root"), "inside.png"]
    with pytest.raises(ImageError, match="cannot be opened"):
        load_image("loop.png", access=access)
    with pytest.raises(ImageError, match=r"the image root .* cannot be reached"):
        load_image("inside.png", access=ImageAccess(root=tree / "gone"))


@pytest.mark.parametrize("path", ["folder_out/outside.png", "link_out.png"])
def test_a_link_made_after_the_check_is_not_followed(tree, monkeypatch, path):
    """As if the folder and the file had been real when the path was resolved and looked at."""
    monkeypatch.setattr(os.path, "realpath", lambda p, strict: str(p))
    monkeypatch.setattr(Path, "lstat", Path.stat)
    with pytest.raises(ImageError, match="cannot be opened"):
        load_image(path, access=ImageAccess(root=tree / "root"))


def test_pipes_sockets_and_devices_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    paths = [tmp_path / "pipe.png", tmp_path / "link.png"]
    paths += [path for path in map(Path, ("/dev/zero", "/dev/tty", "/dev/stdin", "/dev/random")) if path.exists()]
    with socket.socket(socket.AF_UNIX) as listener:
        short = os.path.relpath(tmp_path / "socket.png")  # a socket's path is at most ~100 characters
        if len(short) < 100:
            listener.bind(short)
            paths.append(tmp_path / "socket.png")
        for path in paths:
            error = within(10, lambda path=path: load_image(path))
            assert isinstance(error, ImageError), path
            # The test's own standard input may be a file, or nothing.
            assert str(path) == "/dev/stdin" or re.search("device, pipe or socket", str(error)), error


def test_a_pipe_put_in_place_after_the_check_is_refused_without_waiting(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "file.png").write_bytes(b"x")
    regular = (tmp_path / "file.png").stat()
    monkeypatch.setattr(Path, "lstat", lambda self: regular)
    error = within(10, lambda: load_image(tmp_path / "pipe.png"))
    assert "device, pipe or socket" in str(error)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc")
def test_files_the_kernel_makes_up_are_not_read():
    for path in ("/proc/self/environ", "/proc/kmsg"):
        if Path(path).exists():
            error = within(10, lambda path=path: load_image(path))
            assert re.search("the file is empty|cannot be opened", str(error))


def test_reading_stops_at_the_limit_when_the_file_grows(tmp_path, monkeypatch):
    (tmp_path / "big.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    os.truncate(tmp_path / "big.png", 1 << 36)  # sparse: it takes no room, but reading all of it would
    (tmp_path / "small.png").write_bytes(b"x")
    small = (tmp_path / "small.png").stat()
    monkeypatch.setattr(Path, "lstat", lambda self: small)
    monkeypatch.setattr(os, "fstat", lambda descriptor: small)
    with pytest.raises(ImageError, match="longer than the 5000 bytes allowed"):
        load_image(tmp_path / "big.png", access=ImageAccess(max_bytes=5000))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_no_descriptor_stays_open(tree):
    access = ImageAccess(root=tree / "root")
    (tree / "root" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nxx")

    def count():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    kept = []
    for _ in range(30):
        kept.append(load_image("sub/deep.png", access=access))
        kept.append(load_image(tree / "outside.png"))
        for path in ("bad.png", "link_out.png", "sub", "nothing.png"):
            with pytest.raises(ImageError):
                load_image(path, access=access)
    assert count() == before


def test_results_can_be_sent_between_processes():
    for file_format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        image = load_image(encode(noise(np.random.default_rng(8), 3), file_format))
        assert pickle.loads(pickle.dumps(image)).tobytes() == image.tobytes()
