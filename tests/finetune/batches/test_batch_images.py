"""A batch whose images are pixels, features or some of each is the same batch, however it is cut."""

import pytest
import torch

from finetune.batches.images import image_arguments, image_columns
from finetune.batches.packing import split_batch

COUNTS = [2, 0, 1, 3, 1]
"""Images of each sequence."""


@pytest.fixture
def pixels():
    torch.manual_seed(0)
    return torch.randint(0, 256, (sum(COUNTS), 3, 28, 28), dtype=torch.uint8)


def batch(images) -> dict[str, torch.Tensor]:
    tokens = torch.arange(5 * len(COUNTS))[None]
    return {
        **dict.fromkeys(("input_ids", "labels", "position_ids"), tokens),
        "sequence_lengths": torch.full((len(COUNTS),), 5),
        "sequence_images": torch.tensor(COUNTS),
        "samples": torch.arange(len(COUNTS)),
        **image_columns(images),
    }


@pytest.mark.parametrize("cached", ["none", "all", "some", "first sequence", "last"])
@pytest.mark.parametrize("budget", [None, 10, 12, 1000])
def test_features_by_pack(tiny_model, pixels, cached, budget):
    with torch.no_grad():
        features = tiny_model.get_image_features(pixels)
    which = {"none": [], "all": range(7), "some": [1, 2, 5], "first sequence": [0, 1], "last": [6]}[cached]
    images = [features[n] if n in which else pixels[n] for n in range(7)]
    ends = torch.tensor(COUNTS).cumsum(0)
    packs = split_batch(batch(images), budget)
    assert sorted(int(n) for pack in packs for n in pack["samples"]) == list(range(len(COUNTS)))
    for pack in packs:
        numbers = [n for s in pack["samples"].tolist() for n in range(int(ends[s]) - COUNTS[s], int(ends[s]))]
        given = image_arguments(tiny_model, pack)
        assert given["pixel_values"] is None or given["image_features"] is None
        if not numbers:
            assert given == {"pixel_values": None, "image_features": None}
        elif given["image_features"] is None:
            assert torch.equal(given["pixel_values"], pixels[numbers]) and not set(numbers) & set(which)
        else:
            assert torch.allclose(given["image_features"], features[numbers], atol=1e-5)
            assert not given["image_features"].requires_grad


def test_columns_of_no_images():
    assert image_columns([]) == {}
