"""Decoding through `load_image`: every kind of image comes out as the right RGB or is reported.

Expected pixels are computed with numpy from the samples that were written, not with the code under test.
"""

import io
import random
import re
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from encoded_images import AVIF, chunk, encode, grey, noise, on_white, pil_rgb, pixels_of, png, tiff
from files_of_pages import pdf
from PIL import EpsImagePlugin, GifImagePlugin, Image, ImageFile, features

from qwenvl.errors import InputError
from qwenvl.images.images import ImageAccess, ImageError, load_image
from qwenvl.images.pdf_process import count_pdf_pages

SEEDS = 200


@pytest.fixture(autouse=True)
def no_warning():
    """Pillow's bomb warning, and any other, is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
"""EXIF orientation -> what shows the stored pixels upright (EXIF 2.3, tag 0x0112)."""

# --- 18 kinds of image -----------------------------------------------------------------------------------------------
# Each: (random generator) -> (encoded bytes, expected pixels | pattern of the error | None for "these pixels or an
# error").


def truncated(rng):
    file_format = rng.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *AVIF])
    options = {"progressive": True} if file_format == "JPEG" and rng.random() < 0.5 else {}
    if file_format == "TIFF":
        options["compression"] = str(rng.choice(["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"]))
    whole = encode(noise(rng, 3, width=20, height=20), str(file_format), **options)
    return whole[: rng.integers(0, len(whole))], (pil_rgb(whole), ".")


def zero_bytes(rng):
    return bytes(int(rng.integers(0, 3000))), "empty|unknown kind"


def wrong_extension(rng):
    pixels = noise(rng, 3)
    return encode(pixels, str(rng.choice(["PNG", "BMP", "TIFF", "PPM"]))), pixels


def html(rng):
    start = rng.choice(["<!DOCTYPE html><html>", "<html>", "\n <HTML lang=en>", "<head>"])
    return (str(start) + "<p>404 Not found</p>" * int(rng.integers(0, 50))).encode(), "an HTML page"


def cmyk(rng):
    if rng.random() < 0.5:
        samples = noise(rng, 4)
        data = encode(Image.frombytes("CMYK", samples.shape[1::-1], samples.tobytes()), "TIFF")
        ink = samples.astype(int)
        # 255 - c and 255 - k multiply, rounded as PIL rounds.
        rgb = np.clip(255 - ink[..., 3:] - (ink[..., :3] * (255 - ink[..., 3:]) + 127) // 255, 0, 255)
        return data, rgb.astype(np.uint8)
    # Pillow writes JPEG CMYK inverted with Adobe's marker, as Photoshop does.
    data = encode(Image.new("CMYK", (16, 16), tuple(int(v) for v in rng.integers(0, 256, 4))), "JPEG", quality=95)
    assert b"Adobe" in data
    return data, pil_rgb(data)


def palette_with_alpha(rng):
    indices = noise(rng)
    colors = noise(rng, 3, width=256, height=1)[0]
    if rng.random() < 0.3:  # one transparent entry, as GIF has it
        clear = int(rng.integers(0, 256))
        image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
        image.putpalette(colors.tobytes())
        alpha = np.where(np.arange(256) == clear, 0, 255).astype(np.uint8)
        file_format = str(rng.choice(["PNG", "GIF"]))
        data = encode(image, file_format, transparency=clear, **({"optimize": False} if file_format == "GIF" else {}))
    else:
        alpha = noise(rng, width=256, height=1)[0]
        rows = b"".join(b"\0" + row.tobytes() for row in indices)
        data = png(*indices.shape[::-1], 8, 3, rows, chunk(b"PLTE", colors.tobytes()), chunk(b"tRNS", alpha.tobytes()))
    return data, on_white(colors[indices], alpha[indices])


def grey_with_alpha(rng):
    pixels = noise(rng, 2)
    image = Image.frombytes("LA", pixels.shape[1::-1], pixels.tobytes())
    return encode(image, "PNG"), on_white(grey(pixels[..., 0]), pixels[..., 1])


def rgba(rng):
    pixels = noise(rng, 4)
    options = {"WEBP": {"lossless": True, "exact": True}}
    file_format = str(rng.choice(["PNG", "TIFF", "WEBP"]))
    return encode(pixels, file_format, **options.get(file_format, {})), on_white(pixels[..., :3], pixels[..., 3])


def sixteen_bits(rng):
    order = rng.choice(["<u2", ">u2"])
    samples = rng.integers(0, 65536, (rng.integers(1, 20), rng.integers(1, 20)), dtype=np.uint16).astype(order)
    width, height = samples.shape[::-1]
    big = samples.astype(">u2")
    kind = rng.integers(3)
    if kind == 0:
        data = png(width, height, 16, 0, b"".join(b"\0" + row.tobytes() for row in big))
    elif kind == 1:
        data = tiff(samples)
    else:
        data = b"P5 %d %d 65535\n" % (width, height) + big.tobytes()
    return data, grey((samples.astype(int) * 255 * 2 + 65535) // (65535 * 2))


def floats(rng):
    scale = rng.choice([1.0, 255.0])
    levels = noise(rng)
    levels[0, 0] = 255  # the range is what tells the scale
    samples = (levels + rng.uniform(-0.4, 0.4, levels.shape)).clip(0, 255) * (scale / 255)
    broken = rng.random()
    if broken < 0.2:
        samples[-1, -1] = rng.choice([np.nan, np.inf, -np.inf])
        return tiff(samples.astype("<f4")), "not finite"
    if broken < 0.4:
        samples[0, 0] = rng.choice([-0.5, 300.0])
        return tiff(samples.astype("<f4")), "float pixels run from"
    return tiff(samples.astype("<f4")), grey(levels)


def one_bit(rng):
    bits = rng.random((rng.integers(1, 20), rng.integers(1, 20))) < 0.5
    image = Image.fromarray(bits.astype(np.uint8) * 255).convert("1")
    return encode(image, str(rng.choice(["PNG", "TIFF", "BMP", "PPM", "GIF"]))), grey(bits * 255)


def oriented(rng):
    orientation = int(rng.integers(1, 9))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = noise(rng, 3)
    file_format = str(rng.choice(["PNG", "TIFF", "WEBP", "JPEG"]))
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(pixels, file_format, exif=exif, **options)
    if file_format == "JPEG":  # lossy: the stored pixels are what PIL decodes
        pixels = pil_rgb(data)
    return data, UPRIGHT[orientation](pixels)


def animated(rng):
    shape = (int(rng.integers(2, 16)), int(rng.integers(2, 16)))
    frames = [np.full((*shape, 3), rng.integers(0, 256, 3), np.uint8) for _ in range(3)]
    images = [Image.fromarray(frame) for frame in frames]
    file_format = str(rng.choice(["GIF", "WEBP", "PNG"]))
    options = {"lossless": True} if file_format == "WEBP" else {}
    return encode(images[0], file_format, save_all=True, append_images=images[1:], **options), "it has 3 frames"


def thin(rng):
    size = {"width": 1, "height": int(rng.integers(1, 2000))}
    pixels = noise(rng, 3, **(size if rng.random() < 0.5 else {"width": size["height"], "height": 1}))
    return encode(pixels, str(rng.choice(["PNG", "BMP", "TIFF"]))), pixels


def beyond_the_limit(rng):
    width, height = int(rng.integers(10_001, 2**31)), int(rng.integers(10_000, 2**31))
    return png(1, 1, 8, 2, bytes(4), claim=(width, height)), "more than 100000000 in all"


def bomb(rng):
    # The pixels are really there: a few KB that become gigabytes.
    width = int(rng.integers(20_000, 400_000))
    compressed = zlib.compress(bytes(1 << 20)) * int(rng.integers(1, 20))
    claim = struct.pack(">IIBBBBB", width, width, 8, 6, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", claim) + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")
    return data, "more than 100000000 in all"


def bad_icc(rng):
    pixels = noise(rng, 3)
    file_format = str(rng.choice(["PNG", "TIFF", "WEBP"]))
    options = {"lossless": True} if file_format == "WEBP" else {}
    profile = bytes(rng.integers(0, 256, rng.integers(1, 500), dtype=np.uint8))
    return encode(pixels, file_format, icc_profile=profile, **options), pixels


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def exotic(rng):
    pixels = noise(rng, 3, width=16, height=16)
    return [
        (EPS, "PostScript"),
        (b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(EPS)) + bytes(20) + EPS, "PostScript"),
        (b"%PDF-1.7\n", "its PDF data cannot be read"),
        (b'<?xml version="1.0"?><svg/>', "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (encode(pixels, "JPEG2000") if features.check("jpg_2000") else b"\xff\x4f\xff\x51", "JPEG 2000"),
        (encode(pixels, "ICO"), "an icon"),
        (b"8BPS\0\1", "Photoshop"),
        (encode(pixels, "TGA"), "not an image this project reads"),
        (encode(pixels, "PCX"), "not an image this project reads"),
        (b"P3 1 1 255 1 2 3\n", "not an image this project reads"),
        (b"PK\x03\x04", "an archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"\xd7\xcd\xc6\x9a" + bytes(40), "unknown kind"),  # WMF
    ][rng.integers(14)]


KINDS = [
    truncated,
    zero_bytes,
    wrong_extension,
    html,
    cmyk,
    palette_with_alpha,
    grey_with_alpha,
    rgba,
    sixteen_bits,
    floats,
    one_bit,
    oriented,
    animated,
    thin,
    beyond_the_limit,
    bomb,
    bad_icc,
    exotic,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_kinds_of_image(kind, tmp_path, monkeypatch):
    """200 of each kind, from bytes and through a file: the right pixels or an error that names the image."""
    count_pdf_pages(pdf())  # starts the process that reads PDFs
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    path = tmp_path / "image.jpg"
    for seed in range(SEEDS):
        data, expected = kind(np.random.default_rng([KINDS.index(kind), seed]))
        path.write_bytes(data)
        for source, name in [(data, f"{len(data)} bytes"), (path, "image.jpg")]:
            either = isinstance(expected, tuple)
            try:
                pixels = pixels_of(source, name=f"seed {seed}")
            except ImageError as error:
                pattern = expected[1] if either else expected
                assert isinstance(pattern, str), f"seed {seed}: {error}"
                assert re.search(pattern, error.reason), error
                assert f"seed {seed}" in str(error) and name in str(error) and error.remedy in str(error)
            else:
                assert not isinstance(expected, str), f"seed {seed}: no error, expected {expected}"
                np.testing.assert_array_equal(pixels, expected[0] if either else expected, err_msg=f"seed {seed}")


def test_damaged_bytes_raise_nothing_but_image_error():
    generator = random.Random(0)
    pixels = noise(np.random.default_rng(0), 3, width=12, height=12)
    wholes = [encode(pixels, f) for f in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *AVIF)]
    reported = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on damaged metadata
        for _ in range(1500):
            data = bytearray(generator.choice(wholes))
            for _ in range(generator.randint(1, 4)):
                data[generator.randrange(len(data))] = generator.randrange(256)
            try:
                assert load_image(bytes(data), access=ImageAccess(max_pixels=100_000)).mode == "RGB"
            except ImageError:
                reported += 1
    assert reported > 200


# --- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_is_applied_once(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = noise(np.random.default_rng(4), 3, width=5, height=3)
    lazy = Image.open(io.BytesIO(encode(pixels, "PNG", exif=exif)))
    once = load_image(lazy)
    np.testing.assert_array_equal(np.asarray(once), UPRIGHT[orientation](pixels))
    np.testing.assert_array_equal(pixels_of(once), np.asarray(once))
    np.testing.assert_array_equal(np.asarray(lazy), pixels)  # the caller's image is as it was
    assert lazy.getexif()[0x0112] == orientation


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\xff" * 64]
)
def test_broken_exif_is_ignored(exif):
    pixels = noise(np.random.default_rng(5), 3)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    data = png(*pixels.shape[1::-1], 8, 2, rows, chunk(b"eXIf", exif))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow remarks on it
        np.testing.assert_array_equal(pixels_of(data), pixels)
        jpeg = encode(pixels, "JPEG", exif=exif)
        np.testing.assert_array_equal(pixels_of(jpeg), pil_rgb(jpeg))
    for orientation in (0, 9, 65535):
        wild = Image.Exif()
        wild[0x0112] = orientation
        np.testing.assert_array_equal(pixels_of(encode(pixels, "PNG", exif=wild)), pixels)


# --- size ------------------------------------------------------------------------------------------------------------


def test_a_90_megapixel_scan_passes_in_bounded_memory(tmp_path):
    """11 KB on disk, 361 MB as RGB; in a process of its own to see the peak."""
    path = tmp_path / "scan.png"
    path.write_bytes(png(9500, 9500, 1, 0, bytes((9500 // 8 + 2) * 9500)))
    assert path.stat().st_size < 100_000
    code = (
        "import resource, sys, warnings; from qwenvl.images.images import load_image; warnings.simplefilter('error');"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024; before = peak();"
        "image = load_image(sys.argv[1]); print(image.size, image.mode, peak() - before)"
    )
    command = [sys.executable, "-c", code, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3])
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("(9500, 9500) RGB ")
    assert int(result.stdout.split()[-1]) < 600  # MB: 361 of RGB, 90 of the 1-bit image


def test_the_limit_is_on_pixels_bytes_and_sides():
    data = encode(np.zeros((10, 10, 3), np.uint8), "PNG")
    assert load_image(data, access=ImageAccess(max_pixels=100)).size == (10, 10)
    with pytest.raises(ImageError, match=r"10 x 10 pixels, more than 99"):
        load_image(data, access=ImageAccess(max_pixels=99))
    with pytest.raises(ImageError, match=r"longer than the 50 bytes allowed"):
        load_image(data, access=ImageAccess(max_bytes=50))
    with pytest.raises(ImageError, match=r"500000 a side"):
        load_image(png(1, 1, 8, 0, b"\0\0", claim=(1, 600_000)))
    with pytest.raises(InputError, match="max_pixels must be above 0"):
        ImageAccess(max_pixels=0)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *AVIF])
def test_pillows_own_limit_neither_warns_nor_stops(monkeypatch, file_format):
    data = encode(np.zeros((64, 64, 3), np.uint8), file_format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert load_image(data).size == (64, 64)
    assert Image.MAX_IMAGE_PIXELS == 100  # and is there again for others


def test_truncation_is_found_when_pillow_was_told_to_accept_it(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = encode(noise(np.random.default_rng(6), 3, width=200, height=200), "JPEG")
    half = whole[: len(whole) // 2]
    Image.open(io.BytesIO(half)).load()  # Pillow passes it
    failures = []

    def worker():
        for _ in range(20):
            assert load_image(whole).size == (200, 200)
            try:
                load_image(half)
            except ImageError as error:
                failures.append(error)

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 80 and "truncated" in str(failures[0])
    with pytest.raises(ImageError, match="truncated"):
        load_image(Image.open(io.BytesIO(half)))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


# --- PIL images ------------------------------------------------------------------------------------------------------


def test_the_callers_image_is_not_changed_or_shared():
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.info["transparency"] = b"\xff\x80"
    before = (image.mode, image.tobytes(), image.palette.mode, dict(image.info))
    load_image(image)
    assert (image.mode, image.tobytes(), image.palette.mode, dict(image.info)) == before
    assert image.convert("RGBA").getpixel((0, 0)) == (9, 9, 9, 128)
    rgb = Image.new("RGB", (2, 2))
    rgb.info["comment"] = "mine"
    load_image(rgb).putpixel((0, 0), (1, 2, 3))
    assert rgb.getpixel((0, 0)) == (0, 0, 0) and rgb.info == {"comment": "mine"}


def test_a_lazy_eps_starts_no_program(monkeypatch, tmp_path):
    (tmp_path / "a.jpg").write_bytes(EPS)
    for name in ("Popen", "call", "check_call", "check_output", "run"):
        monkeypatch.setattr(subprocess, name, lambda *a, **k: pytest.fail("a program was started"))
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was started"))
    with pytest.raises(ImageError, match="PostScript"):
        load_image(tmp_path / "a.jpg")
    lazy = EpsImagePlugin.EpsImageFile(io.BytesIO(EPS))
    with pytest.raises(ImageError, match="EPS images are not decoded here"):
        load_image(lazy)


def test_a_registered_plugin_is_not_asked(monkeypatch):
    def plugin(*_):
        pytest.fail("a plugin was asked")

    Image.init()
    for name in list(Image.OPEN):
        monkeypatch.setitem(Image.OPEN, name, (plugin, lambda prefix: True))
    assert load_image(encode(Image.new("RGB", (2, 2)), "PNG")).size == (2, 2)


def test_a_gif_frame_with_transparency_is_on_white():
    frames = [Image.new("P", (4, 4), index) for index in (0, 1)]
    for frame in frames:
        frame.putpalette([200, 0, 0, 0, 0, 200])
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], transparency=0, disposal=2)
    assert isinstance(Image.open(io.BytesIO(data)), GifImagePlugin.GifImageFile)
    assert pixels_of(data, page=1)[0, 0].tolist() == [255, 255, 255]
