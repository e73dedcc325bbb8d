"""What many tests share: the tiny checkpoint of the oracle, and the numbers of the published implementation for it.

`tests/data/tiny` was made by running the published Qwen-VL code (float32, CPU) on `examples/tiny`, a small checkpoint
in the published layout with random weights.
Long tensors in `expected.safetensors` keep every n-th row only; `every_nth` selects the same rows from ours.
"""

import gc
import json
import os
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
HF_HOME = os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="qwenvl-tests-")  # whatever is kept there is of this session

import numpy as np
import pytest
import torch
from gptq_for_tests import write_int4, write_unpacked
from PIL import Image
from safetensors.torch import load_file

from qwenvl import QwenVLForConditionalGeneration, QwenVLProcessor, QwenVLTokenizer
from qwenvl.images.image_processor import normalize_pixels

TINY = Path(__file__).parent / "data" / "tiny"
TINY_IMAGES = [TINY / "images" / f"{letter}.png" for letter in "abcde"]


def pytest_collection_finish() -> None:
    """Leave what was imported out of each later search for garbage, of which a short training has several."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    shutil.rmtree(HF_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    return Path(__file__).parent.parent / "examples" / "tiny"


@pytest.fixture(scope="session")
def int4(tmp_path_factory) -> Path:
    """The tiny checkpoint packed by GPTQ; not to be changed."""
    return write_int4(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    """What `int4` stands for, in 16 bits; not to be changed."""
    return write_unpacked(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def tiny_images() -> list[Path]:
    return TINY_IMAGES


@pytest.fixture(scope="session")
def expected() -> dict[str, torch.Tensor]:
    return load_file(TINY / "expected.safetensors")


@pytest.fixture(scope="session")
def published_pixels(expected) -> torch.Tensor:
    """(5, 3, 112, 112) float32: the tiny images as the published preprocessing makes them with a Pillow of its time.

    `expected["pixel_values"]` are what the published code's other numbers belong to. They were made with Pillow 13,
    which resizes the one tall image, d, down first; `d_resized.png` is that image resized by Pillow 10.0.0.
    """
    levels = torch.from_numpy(np.array(Image.open(TINY / "d_resized.png"))).permute(2, 0, 1)
    pixels = expected["pixel_values"].clone()
    pixels[3] = normalize_pixels(levels)
    return pixels


@pytest.fixture(scope="session")
def expected_json() -> dict:
    return json.loads((TINY / "expected.json").read_text())


@pytest.fixture
def tiny_model(tiny_folder) -> QwenVLForConditionalGeneration:
    return QwenVLForConditionalGeneration.from_pretrained(tiny_folder).eval()


@pytest.fixture(scope="session")
def tiny_processor(tiny_folder) -> QwenVLProcessor:
    return QwenVLProcessor.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def published_tokenizer() -> QwenVLTokenizer:
    """The published vocabulary (Apache-2.0), from the test extra's `dashscope` package."""
    return QwenVLTokenizer(str(files("dashscope") / "resources" / "qwen.tiktoken"))
