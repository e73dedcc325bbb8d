"""`QwenVLImageProcessor` against the published preprocessing, and as a Transformers image processor."""

import json
import pickle
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded_images import encode, noise
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from qwenvl.errors import InputError
from qwenvl.images.image_processor import IMAGE_MEAN, IMAGE_STD, QwenVLImageProcessor, normalize_pixels
from qwenvl.images.images import ImageAccess, ImageError

TINY = Path(__file__).parents[2] / "data" / "tiny"
FILES = [TINY / "images" / f"{name}.png" for name in "abcde"]


@pytest.fixture
def processor():
    return QwenVLImageProcessor(size=112)


def test_published_preprocessing(processor, published_pixels):
    pixels = processor(FILES, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (5, 3, 112, 112) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, published_pixels, rtol=0, atol=1e-6)


def test_uint8_finished_by_normalize_pixels(processor, published_pixels):
    levels = processor(FILES, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert levels.shape == (5, 3, 112, 112) and levels.dtype == torch.uint8
    torch.testing.assert_close(normalize_pixels(levels), published_pixels, rtol=0, atol=1e-6)
    same = QwenVLImageProcessor(size=112, do_normalize=False)(FILES, return_tensors="pt")["pixel_values"]
    assert torch.equal(levels, same)
    half = normalize_pixels(levels, torch.bfloat16)
    assert torch.equal(half, normalize_pixels(levels).bfloat16())


def test_normalize_pixels_is_the_formula_at_every_level():
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[:, None]
    mean, std = (torch.tensor(c, dtype=torch.float64)[:, None, None] for c in (IMAGE_MEAN, IMAGE_STD))
    exact = (levels.double() / 255 - mean) / std
    torch.testing.assert_close(normalize_pixels(levels).double(), exact, rtol=0, atol=1e-6)
    assert torch.equal(levels, torch.arange(256, dtype=torch.uint8).repeat(3, 1)[:, None])  # not in place
    for wrong in (levels.float(), levels[:2], levels[0]):
        with pytest.raises(InputError, match="normalize_pixels takes"):
            normalize_pixels(wrong)


def test_resizing_is_pils_bicubic_without_aspect_ratio():
    pixels = noise(np.random.default_rng(0), 3, width=50, height=20)
    levels = QwenVLImageProcessor(size=16)(pixels, do_normalize=False, return_tensors="np")["pixel_values"]
    resized = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(levels[0].transpose(1, 2, 0), np.asarray(resized))


def test_return_tensors(processor, published_pixels):
    for kind, container in [("pt", torch.Tensor), ("np", np.ndarray), (None, list)]:
        output = processor(FILES[:2], return_tensors=kind)
        assert isinstance(output, BatchFeature) and list(output) == ["pixel_values"]
        values = output["pixel_values"]
        assert isinstance(values, container)
        assert isinstance(values[0], torch.Tensor if kind == "pt" else np.ndarray)
        np.testing.assert_allclose(np.stack([np.asarray(v) for v in values]), published_pixels[:2].numpy(), atol=1e-6)
    assert processor(FILES[0], return_tensors="pt", device="cpu")["pixel_values"].shape[0] == 1


def test_sources_and_nesting(processor, published_pixels):
    data = FILES[2].read_bytes()
    images = [[str(FILES[0])], (FILES[1], [data, {"bytes": FILES[3].read_bytes(), "path": None}]), [], [[FILES[4]]]]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, published_pixels, rtol=0, atol=1e-6)
    single = Image.open(FILES[0])
    for one in (single, [single], FILES[0], np.asarray(single)[None], torch.from_numpy(np.array(single))[None]):
        torch.testing.assert_close(processor(one, return_tensors="pt")["pixel_values"], published_pixels[:1])
    assert processor([], return_tensors="pt")["pixel_values"].shape == (0, 3, 112, 112)
    assert processor([[], []])["pixel_values"] == []


def test_a_bad_image_is_named(processor, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(encode(Image.new("RGB", (40, 40)), "JPEG")[:-30])
    with pytest.raises(ImageError, match=r"images\[1\]\[0\] \('.*bad\.jpg'\): its JPEG data cannot be decoded"):
        processor([FILES[0], [tmp_path / "bad.jpg"]])
    with pytest.raises(ImageError, match=r"^image \(3 bytes\)"):
        processor(b"abc")
    with pytest.raises(ImageError, match=r"images\[0\] \(NoneType\)"):
        processor([None])


def test_access(processor, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("a name was looked up"))
    access = ImageAccess(root=TINY / "images")
    assert processor("a.png", access=access, return_tensors="pt")["pixel_values"].shape[0] == 1
    with pytest.raises(ImageError, match="outside the image root"):
        processor(["a.png", "../expected.json"], access=access)
    for call in (processor, processor.preprocess):
        with pytest.raises(ImageError, match="URLs are not fetched here"):
            call("https://host.test/a.png")
    # Transformers' processors call this first, and theirs opens what it is given.
    urls = [["https://host.test/a.png"], "/etc/passwd"]
    assert processor.fetch_images(urls) is urls


def test_round_trip(tmp_path):
    processor = QwenVLImageProcessor(size=224, do_normalize=False)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved == {
        "image_processor_type": "QwenVLImageProcessor",
        "size": {"height": 224, "width": 224},
        "do_resize": True,
        "resample": 3,
        "do_convert_rgb": True,
        "do_rescale": False,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }
    again = QwenVLImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict() == saved
    assert again.size["height"] == 224 and again.do_normalize is False
    normalizing = QwenVLImageProcessor.from_pretrained(tmp_path, do_rescale=True, do_normalize=True, size=448)
    assert normalizing.to_dict() == QwenVLImageProcessor().to_dict()
    assert pickle.loads(pickle.dumps(again)).to_dict() == saved
    assert "224" in repr(again)


@pytest.mark.parametrize("size", [112, {"height": 112, "width": 112}])
def test_sizes(processor, size):
    assert QwenVLImageProcessor(size=size).size == {"height": 112, "width": 112}
    assert QwenVLImageProcessor()(FILES[0], size=size, return_tensors="pt")["pixel_values"].shape[-2:] == (112, 112)


@pytest.mark.parametrize(
    "size",
    [0, -1, True, 1.5, "112", None, {}, {"height": 1}, {"height": 2, "width": 3}, {"shortest_edge": 112}, (112, 112)],
)
def test_sizes_that_are_no_square(processor, size):
    with pytest.raises(InputError, match="size must be one side in pixels"):
        QwenVLImageProcessor(size=size)


@pytest.mark.parametrize(
    "option",
    [
        {"do_resize": False},
        {"do_rescale": False},
        {"do_center_crop": True},
        {"do_pad": True},
        {"do_convert_rgb": False},
        {"resample": Image.Resampling.BILINEAR},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": [0.5, 0.5, 0.5]},
        {"image_std": 0.5},
        {"data_format": "channels_last"},
    ],
)
def test_another_preprocessing_is_refused(processor, option):
    with pytest.raises(InputError, match="preprocessed with"):
        QwenVLImageProcessor(**option)
    with pytest.raises(InputError, match="preprocessed with"):
        processor(FILES[0], **option)


def test_options_that_say_what_is_done_anyway(processor, published_pixels, caplog):
    options = {
        "do_resize": True,
        "do_rescale": True,
        "do_convert_rgb": True,
        "do_center_crop": False,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": list(IMAGE_MEAN),
        "image_std": np.array(IMAGE_STD),
        "data_format": "channels_first",
        "input_data_format": None,
        "crop_size": None,
        "disable_grouping": True,
    }
    QwenVLImageProcessor(**options, processor_class="QwenVLProcessor", image_processor_type="QwenVLImageProcessor")
    pixels = processor(FILES, **options, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, published_pixels, rtol=0, atol=1e-6)
    assert caplog.text == ""
    processor(FILES[0], brightness=2)
    assert "no option 'brightness'" in caplog.text


class OnlyImages(ProcessorMixin):
    """The stock processor around nothing but this image processor."""

    def __init__(self, image_processor):
        super().__init__(image_processor)


def test_under_transformers_processor(processor, published_pixels):
    """Its options pass `ProcessorMixin`'s own validation, `access` among them."""
    stock = OnlyImages(processor)
    images = [Image.open(file) for file in FILES]
    output = stock(images=images, return_tensors="pt", do_resize=True, access=ImageAccess())
    torch.testing.assert_close(output["pixel_values"], published_pixels, rtol=0, atol=1e-6)
    levels = stock(images=images, images_kwargs={"do_normalize": False, "return_tensors": "pt"})["pixel_values"]
    assert levels[0].dtype == torch.uint8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stock(images=images[:1], return_tensors="pt", size=56)["pixel_values"].shape == (1, 3, 56, 56)
