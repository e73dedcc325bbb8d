"""Colour: what every mode and depth comes out as, against values computed by hand."""

import struct

import numpy as np
import pytest
from encoded_images import chunk, grey, noise, on_white, pixels_of, png, tiff
from PIL import Image

from qwenvl.images.images import ImageError, load_image


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_opaque_images_are_what_pil_converts_them_to(mode):
    samples = noise(np.random.default_rng(1), 4, width=9, height=7)
    image = Image.fromarray(samples).convert("RGB").convert("L" if mode == "1" else mode).convert(mode)
    before = image.tobytes()
    np.testing.assert_array_equal(pixels_of(image), np.asarray(image.convert("RGB")))
    assert image.tobytes() == before


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA"])
def test_alpha_is_composited_on_white(mode):
    image = Image.new("RGBA", (2, 1), (10, 10, 10, 255))
    image.putpixel((1, 0), (10, 10, 10, 0))
    image = {"La": image.convert("LA"), "PA": image}.get(mode, image).convert(mode)
    assert pixels_of(image).tolist() == [[[10] * 3, [255] * 3]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_transparent_grey_of_a_png(bits):
    """tRNS names a sample as the file has it, at any depth."""
    top, clear = 2**bits - 1, 2**bits // 2
    packed = f"{clear:0{bits}b}{top:0{bits}b}".ljust(8 * (1 if bits < 8 else bits // 4), "0")
    row = b"\0" + int(packed, 2).to_bytes(len(packed) // 8, "big")
    data = png(2, 1, bits, 0, row, chunk(b"tRNS", struct.pack(">H", clear)))
    assert pixels_of(data).tolist() == [[[255] * 3, [255] * 3]]
    data = png(2, 1, bits, 0, row, chunk(b"tRNS", struct.pack(">H", 0)))
    assert pixels_of(data)[0, 0, 0] == round(255 * clear / top)


def test_transparent_rgb_of_a_png():
    row = b"\0" + bytes([1, 2, 3, 4, 5, 6])
    key = chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))
    assert pixels_of(png(2, 1, 8, 2, row, key)).tolist() == [[[255] * 3, [4, 5, 6]]]
    with pytest.raises(ImageError, match="16-bit PNG with a transparent colour"):
        load_image(png(1, 1, 16, 2, bytes(7), key))


def test_deep_integers():
    assert pixels_of(png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 0, 65535, 0x8040))).tolist() == [[[0, 255, 128]]]
    # 12 bits packed: 0, 4095, 2048, 16
    twelve = tiff(np.zeros((1, 4), "<u2"), bits=12, data=bytes.fromhex("000fff800010"))
    assert pixels_of(twelve)[0, :, 0].tolist() == [0, 255, 128, 1]
    assert pixels_of(b"P5 2 1 4095\n" + struct.pack(">HH", 4095, 15))[0, :, 0].tolist() == [255, 1]
    for mode in ("I;16", "I;16L", "I;16B"):
        data = np.array([0, 65535, 257], ">u2" if mode == "I;16B" else "<u2").tobytes()
        assert pixels_of(Image.frombytes(mode, (3, 1), data))[0, :, 0].tolist() == [0, 255, 1]
    integers = {(0, 200): [0, 200], (0, 65535): [0, 255], (257, 514): [1, 2]}
    for samples, levels in integers.items():
        assert pixels_of(Image.fromarray(np.array([samples], np.int32)))[0, :, 0].tolist() == levels
    for samples in [(-1, 5), (0, 65536)]:
        with pytest.raises(ImageError, match="integer pixels run from"):
            load_image(Image.fromarray(np.array([samples], np.int32)))
    with pytest.raises(ImageError, match="integer pixels run from"):
        load_image(tiff(np.array([[2**32 - 1, 0]], "<u4")))


def test_large_images_are_converted_in_strips(monkeypatch):
    monkeypatch.setattr("qwenvl.images.image_color._STRIP_PIXELS", 30)
    rng = np.random.default_rng(3)
    pixels = noise(rng, 4, width=13, height=31)
    np.testing.assert_array_equal(pixels_of(Image.fromarray(pixels)), on_white(pixels[..., :3], pixels[..., 3]))
    levels = rng.random((31, 13), dtype=np.float32) * 255
    np.testing.assert_array_equal(pixels_of(Image.fromarray(levels)), grey(np.rint(levels)))
    levels[30, 12] = np.nan
    with pytest.raises(ImageError, match="not finite"):
        load_image(Image.fromarray(levels))
