"""Synthetic samples: their lengths, their tokens, and batches of the same form as the collator's."""

import numpy as np
import pytest
import torch

from finetune.batches.packing import split_batch
from finetune.bench.workload import BenchCollator, Lengths, PaddedCollator, draw_lengths
from finetune.errors import UserError
from qwenvl import QwenVLConfig
from qwenvl.model.image_span import image_span_starts
from qwenvl.text.chat import IGNORED

SPAN = 258
LENGTHS = [Lengths(300, 20, 1), Lengths(290, 5, 1), Lengths(270, 3, 1)]


@pytest.fixture(scope="module")
def config(tiny_folder) -> QwenVLConfig:
    return QwenVLConfig.from_pretrained(tiny_folder)


def rows(*numbers: int) -> list[dict[str, int]]:
    return [{"sample": number} for number in numbers]


def test_a_number_is_the_length_of_every_sample(config):
    assert draw_lengths("512", 3, config, most=100) == [Lengths(512, (512 - SPAN) // 2, 1)] * 3


def test_the_mix_is_as_of_questions_on_documents(config):
    drawn = draw_lengths("mix", 4000, config, most=768)
    tokens, supervised = np.array([sample.tokens for sample in drawn]), [sample.supervised for sample in drawn]
    assert tokens.mean() == pytest.approx(310, abs=1)
    assert np.mean(supervised) == pytest.approx(9, abs=0.5)
    assert tokens.min() > SPAN + 28 and np.median(tokens) < tokens.mean()
    assert {sample.images for sample in drawn} == {1}
    assert drawn == draw_lengths("mix", 4000, config, most=768)
    assert drawn != draw_lengths("mix", 4000, config, most=768, seed=1)


def test_the_mix_keeps_to_the_longest_that_is_allowed(config):
    drawn = draw_lengths("mix", 2000, config, most=305)
    assert max(sample.tokens for sample in drawn) == 305
    assert min(sample.supervised for sample in drawn) >= 2


def test_a_text_model_has_no_images():
    drawn = draw_lengths("64", 2, QwenVLConfig(visual=None), most=64)
    assert drawn == [Lengths(64, 32, 0)] * 2


@pytest.mark.parametrize(("samples", "most"), [("260", 2048), ("mix", 290)])
def test_samples_without_room_for_an_image_are_refused(config, samples, most):
    with pytest.raises(UserError, match=f"--lengths {samples}"):
        draw_lengths(samples, 1, config, most=most)


def test_batches_have_the_form_of_the_collators(config):
    collator = BenchCollator(LENGTHS, config, None)
    batch = collator(rows(0, 2))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, 570)
    assert batch["sequence_lengths"].tolist() == [300, 270] and batch["samples"].tolist() == [0, 2]
    assert batch["position_ids"][0, [0, 299, 300, 569]].tolist() == [0, 299, 0, 269]
    assert batch["pixel_values"].shape == (2, 3, 112, 112) and batch["pixel_values"].dtype == torch.uint8
    assert image_span_starts(batch["input_ids"], config).sum() == 2
    trained = batch["labels"][0] != IGNORED
    assert trained.nonzero()[:, 0].tolist() == [*range(280, 300), *range(567, 570)]
    assert torch.equal(batch["labels"][0, trained], batch["input_ids"][0, trained])
    # A sample is the same in every batch, and a pack of it too.
    pack = split_batch(batch, None)[1]
    assert torch.equal(pack["input_ids"], collator(rows(2))["input_ids"]) and len(pack["pixel_values"]) == 1


def test_features_stand_in_for_pixels(config):
    batch = BenchCollator(LENGTHS, config, None, torch.bfloat16)(rows(0, 1))
    assert "pixel_values" not in batch
    assert batch["image_features"].shape == (2, 256, 256) and batch["image_features"].dtype == torch.bfloat16


def test_padded_as_published(config):
    batch = PaddedCollator(LENGTHS, config, None, padded_to=320)(rows(1))
    plain = BenchCollator(LENGTHS, config, None)(rows(1))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (1, 320)
    assert torch.equal(batch["input_ids"][:, :290], plain["input_ids"])
    assert torch.equal(batch["labels"][:, :290], plain["labels"]) and (batch["labels"][:, 290:] == IGNORED).all()
    assert batch["attention_mask"].sum() == 290 and batch["attention_mask"][0, 289] == 1
    assert split_batch(batch, None) == [batch]
