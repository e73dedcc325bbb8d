"""Noise on embeddings: of each conversation's own strength, however it is packed."""

from math import sqrt
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl
from transformers.integrations.neftune import neftune_post_forward_hook

from finetune.training.neftune import NoisyEmbeddings

LENGTHS = [7, 40, 200]
ALPHA = 5.0


@pytest.fixture
def noisy(tiny_model):
    model = tiny_model.train()
    noise = NoisyEmbeddings(ALPHA)
    noise.on_train_begin(SimpleNamespace(), SimpleNamespace(), TrainerControl(), model=model)
    yield model, noise
    noise.on_train_end(SimpleNamespace(), SimpleNamespace(), TrainerControl(), model=model)


def embeddings_of(model, lengths):
    """What the layers get for sequences of these lengths in one row: (tokens, width)."""
    got = []
    handle = model.transformer.h[0].register_forward_pre_hook(
        lambda module, args, kwargs: got.append((args[0] if args else kwargs["hidden_states"])[0].detach()),
        with_kwargs=True,
    )
    ids = torch.arange(sum(lengths))[None] % 300
    model(input_ids=ids, sequence_lengths=lengths, use_cache=False)
    handle.remove()
    return got[0], model.transformer.wte.weight.detach()[ids[0]]


def test_each_sequence_has_the_strength_that_it_has_alone(noisy):
    model, _ = noisy
    embedded, plain = embeddings_of(model, LENGTHS)
    width = plain.shape[1]
    for noise, length in zip((embedded - plain).split(LENGTHS), LENGTHS, strict=True):
        strength = ALPHA / sqrt(length * width)
        assert noise.abs().max() <= strength * 1.0001
        assert noise.std().item() == pytest.approx(strength / sqrt(3), rel=0.1)


def test_of_one_sequence_it_is_transformers_noise(noisy):
    model, _ = noisy
    torch.manual_seed(0)
    embedded, plain = embeddings_of(model, [40])
    torch.manual_seed(0)
    theirs = neftune_post_forward_hook(SimpleNamespace(training=True, neftune_noise_alpha=ALPHA), None, plain[None])
    torch.testing.assert_close(embedded, theirs[0], rtol=0, atol=1e-6)


def test_there_is_none_in_evaluation_and_after_training(noisy):
    model, noise = noisy
    model.eval()
    embedded, plain = embeddings_of(model, LENGTHS)
    assert torch.equal(embedded, plain)
    model.train()
    noise.on_train_end(SimpleNamespace(), SimpleNamespace(), TrainerControl(), model=model)
    embedded, plain = embeddings_of(model, LENGTHS)
    assert torch.equal(embedded, plain)
