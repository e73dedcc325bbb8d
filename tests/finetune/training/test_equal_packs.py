"""Packs that are made alike on all processes compute what they computed before."""

import pytest
import torch

from finetune.batches.collate import NO_SAMPLE
from finetune.batches.images import image_columns
from finetune.batches.packing import split_batch
from finetune.model.step_loss import forward_with_loss
from finetune.training import equal_packs
from finetune.training.equal_packs import Fillers, equalize
from qwenvl.text.chat import IGNORED

TOKEN = 5


@pytest.fixture
def fillers(tiny_model):
    return Fillers.of(tiny_model.config, TOKEN)


@pytest.fixture
def others(monkeypatch):
    """What the other processes have: the number of their packs, and which of them encode images."""

    def set_to(*encodes: bool):
        theirs = [torch.tensor(len(encodes)), torch.tensor([*encodes, *[False] * 9], dtype=torch.uint8)]

        def all_reduce(values, op):
            other = theirs.pop(0).to(values.device)
            torch.maximum(values, other[: len(values)] if values.ndim else other, out=values)

        monkeypatch.setattr(equal_packs.dist, "all_reduce", all_reduce)

    return set_to


def batch_of(fillers, kinds, width=0):
    """Sequences of text ("t"), with an image to encode ("i") or with a cached one ("c")."""
    generator = torch.Generator().manual_seed(1)
    ids, lengths, images, read = [], [], [], []
    for number, kind in enumerate(kinds):
        text = torch.randint(10, 200, (6 + number,), generator=generator).tolist()
        sequence = text if kind == "t" else [*fillers.image, *text]
        ids += sequence
        lengths.append(len(sequence))
        images.append(int(kind != "t"))
        if kind == "i":
            read.append(torch.randint(0, 256, fillers.pixels.shape[1:], dtype=torch.uint8, generator=generator))
        elif kind == "c":
            read.append(torch.randn(len(fillers.image) - 2, width, generator=generator))
    labels = torch.tensor([ids])
    labels[0, torch.tensor([0, *lengths]).cumsum(0)[:-1]] = IGNORED
    return {
        "input_ids": torch.tensor([ids]),
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "sequence_lengths": torch.tensor(lengths),
        "sequence_images": torch.tensor(images),
        "samples": torch.arange(len(kinds)),
        **image_columns(read),
    }


def loss_and_gradients(model, packs):
    model.zero_grad()
    total = torch.zeros(())
    for pack in packs:
        loss = forward_with_loss(model, model, pack, 10).loss
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kinds", ["t", "ti", "c", "itc"])
def test_loss_and_gradients_are_unchanged(tiny_model, fillers, others, kinds):
    tiny_model.train()
    try:
        packs = split_batch(batch_of(fillers, kinds, tiny_model.config.hidden_size), 5000)
        before = loss_and_gradients(tiny_model, packs)
        others(True, False, True)
        equal = equalize(packs, fillers, torch.device("cpu"))
        assert len(equal) == 3
        assert [equal_packs.PIXELS in pack for pack in equal] == [True, False, True]
        after = loss_and_gradients(tiny_model, equal)
    finally:
        tiny_model.eval()
        tiny_model.zero_grad()
    torch.testing.assert_close(after[0], before[0], rtol=1e-6, atol=0)
    for name, gradient in after[1].items():
        torch.testing.assert_close(gradient, before[1].get(name, torch.zeros_like(gradient)), rtol=2e-4, atol=1e-6)


def test_only_what_another_process_has_is_added(fillers, others):
    packs = split_batch(batch_of(fillers, "ti"), None)
    others(False, True)
    assert equalize(packs, fillers, torch.device("cpu")) == packs
    others(True, True)
    text, image = equalize(packs, fillers, torch.device("cpu"))
    assert image is packs[1]
    assert text["samples"].tolist() == [0, NO_SAMPLE]
    assert text["sequence_lengths"].tolist() == [6, len(fillers.image)]
    assert text["sequence_images"].tolist() == [0, 1]
    assert text["input_ids"][0, :6].tolist() == packs[0]["input_ids"][0].tolist()
    assert (text["labels"][0, 6:] == IGNORED).all()
    assert "samples" in packs[0] and packs[0]["samples"].tolist() == [0]  # what was given is as it was


def test_a_process_without_a_batch_gets_empty_packs(fillers, others):
    others(False, False)
    packs = equalize([], fillers, torch.device("cpu"))
    assert [pack["samples"].tolist() for pack in packs] == [[NO_SAMPLE], [NO_SAMPLE]]
    assert all((pack["labels"] == IGNORED).all() for pack in packs)
