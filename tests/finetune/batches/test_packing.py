import random

import pytest
import torch

from finetune.batches.packing import pack, split_batch


def test_every_sequence_once_and_within_the_budget():
    generator = random.Random(0)
    for _ in range(200):
        lengths = [generator.randint(1, 300) for _ in range(generator.randint(1, 60))]
        budget = generator.randint(100, 2000)
        packs = pack(lengths, budget)
        assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
        for members in packs:
            assert sum(lengths[index] for index in members) <= budget or len(members) == 1
            assert members == sorted(members)
        # First fit, longest first, is within 11/9 of the best (Johnson 1973), and the best is at least the sum.
        best = max(-(-sum(lengths) // budget), sum(length > budget / 2 for length in lengths))
        assert len(packs) <= 11 / 9 * best + 1 + sum(length > budget for length in lengths)


def test_no_budget_is_one_sequence_a_pack():
    assert pack([5, 3, 9], None) == [[0], [1], [2]]


def test_a_sequence_beyond_the_budget_is_alone():
    assert pack([50, 700, 40], 100) == [[1], [0, 2]] or pack([50, 700, 40], 100) == [[0, 2], [1]]


def batch(lengths, images):
    tokens = sum(lengths)
    columns = {
        "input_ids": torch.arange(tokens)[None],
        "labels": torch.arange(tokens)[None] + 1000,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "sequence_lengths": torch.tensor(lengths),
        "sequence_images": torch.tensor(images),
        "samples": torch.arange(len(lengths)) + 70,
    }
    if sum(images):
        columns["pixel_values"] = torch.arange(sum(images))[:, None, None, None].expand(-1, 3, 2, 2)
    return columns


@pytest.mark.parametrize("budget", [None, 10, 25, 1000])
def test_a_batch_is_cut_at_its_sequences_with_their_images(budget):
    lengths, images = [8, 3, 12, 5], [1, 0, 2, 0]
    whole = batch(lengths, images)
    parts = split_batch(whole, budget)
    assert sum(len(part["sequence_lengths"]) for part in parts) == 4
    starts = {70: (0, 0), 71: (8, 1), 72: (11, 1), 73: (23, 3)}
    for part in parts:
        tokens, pixels = [], []
        for sample in part["samples"].tolist():
            index = sample - 70
            tokens += range(starts[sample][0], starts[sample][0] + lengths[index])
            pixels += range(starts[sample][1], starts[sample][1] + images[index])
        assert part["input_ids"][0].tolist() == tokens
        assert part["labels"][0].tolist() == [token + 1000 for token in tokens]
        assert part["position_ids"][0].tolist() == [n for length in part["sequence_lengths"] for n in range(length)]
        assert ("pixel_values" in part) == bool(pixels)
        if pixels:
            assert part["pixel_values"][:, 0, 0, 0].tolist() == pixels


def test_a_batch_that_fits_is_left_as_it_is():
    whole = batch([4, 4], [0, 1])
    assert split_batch(whole, 8)[0] is whole
